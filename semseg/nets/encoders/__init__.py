"""Encoders: from an image to maps, fine to coarse."""
