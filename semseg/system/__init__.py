"""This process and its terminal: parents, signals, streams, printable text.

Starting other processes lives in cli/. No torch.
"""
