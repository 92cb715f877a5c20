"""Networks: encoders, decoders, and the Segmenter that joins one of each."""
