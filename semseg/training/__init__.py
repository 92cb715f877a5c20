"""Losses, optimisers, schedules, resuming.

Callbacks and loggers have folders of their own; the module is semseg/lit_module.py.
"""
