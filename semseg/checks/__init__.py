"""What is wrong with a data set, and which settings fit it (mode=check).

The page that shows it lives in reports/. Whether a machine can train is modes/doctor.py.
"""
