"""Networks for other programs: ONNX and torch.export, running them, int8 quantisation.

Our own checkpoints live in checkpoints/.
"""
