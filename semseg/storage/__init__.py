"""Files on disk and from the net: atomic writing, the run lock, downloads, archives, results of runs.

Data sets live in data/, checkpoints in checkpoints/. No torch.
"""
