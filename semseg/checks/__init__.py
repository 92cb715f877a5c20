"""What is wrong with a data set (mode=check) or a machine (mode=doctor).

The pages that show it live in reports/, the modes in modes/.
"""
