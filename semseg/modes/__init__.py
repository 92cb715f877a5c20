"""One file for each `mode=`, with one function `run(config, overrides)`.

What modes share lives in the packages below them.
"""
