"""Exports of annotation tools as data sets: readers, one file for each format, drawing, and writing. No torch.

`formats.py` has the table of formats; each reader makes an `Export` (`model.py`), and `write.py` draws its masks.
"""
