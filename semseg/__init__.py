"""Train, evaluate and apply semantic segmentation networks."""

# No imports here: `run.py --help` must not pay for torch.
__version__ = "0.1.0"
