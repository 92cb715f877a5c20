"""The command line: parse and compose it, start and watch processes, run sweeps, exit codes.

What a mode does lives in modes/.
"""
