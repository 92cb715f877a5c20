"""What a command line means: the schema and its checks, hints for typos, preprocessing conventions.

The YAML files live in configs/, objects are built in build.py. No torch.
"""
