"""The configuration: schema and checks, overrides, composing, hints for typos, preprocessing. No torch.

The YAML files are in configs/; objects are built in build.py.
"""
