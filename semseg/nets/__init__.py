"""Networks: interfaces, encoders, decoders, the segmenter, their cost and memory.

Weights live in checkpoints/, synchronised batch normalisation in syncbn/.
"""
