"""Networks as files for other programs: ONNX, torch.export, int8 quantisation; and running ONNX files.

Our own checkpoints live in checkpoints/.
"""
