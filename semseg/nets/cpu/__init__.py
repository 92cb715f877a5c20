"""Faster kernels for networks on the CPU: Winograd, 1 x 1 convolutions by oneDNN, upsampling in strips.

Imported only when a network runs on a CPU. The results are equal to PyTorch's within float32 rounding.
"""
