"""Batch normalisation whose statistics are reduced over all devices."""
