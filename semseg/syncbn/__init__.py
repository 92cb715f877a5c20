"""Batch normalisation whose statistics are reduced over ranks."""
