"""From files to sub-batches: records, plan, decoding, labels, augmentation, data sets.

The Lightning data module is semseg/datamodule.py; normalisation happens on the device, in nets/.
"""
