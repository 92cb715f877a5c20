"""HTML pages and pictures of evaluations, comparisons, sweeps and data checks.

The scores come from evaluation/.
"""
