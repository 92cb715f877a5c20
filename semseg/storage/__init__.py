"""Files on disk and from the network: atomic writing, the run lock, downloads, archives, results of runs.

Data sets are in data/, checkpoints in checkpoints/. No torch.
"""
