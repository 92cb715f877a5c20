"""Checkpoints and weights: our format, atomic writing, initial weights, the published files of 2018 and 2020, the zoo.

Resuming a run from a checkpoint is in training/resume.py.
"""
