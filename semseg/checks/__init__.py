"""Checks of a data set, and suggested settings for it (mode=check).

The page with the results is in reports/. modes/doctor.py checks the machine.
"""
