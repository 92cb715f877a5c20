"""This process and its terminal: parents, signals, streams, printable text.

Other processes are started in cli/. No torch.
"""
