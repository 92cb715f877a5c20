"""Decoders: from an encoder's maps to logits."""
