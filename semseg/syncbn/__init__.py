"""Batch normalisation with statistics over all ranks."""
