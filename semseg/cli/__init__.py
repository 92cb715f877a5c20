"""The command line: entry point, supervision of processes, sweeps, exit codes.

What a mode does is in modes/.
"""
