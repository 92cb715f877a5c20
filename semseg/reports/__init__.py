"""HTML pages and pictures of evaluations, comparisons, sweeps and data checks.

The package `evaluation` computes the scores that they show.
"""
