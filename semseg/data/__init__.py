"""From files on disk to sub-batches: geometry, records, classes, plan, images, data sets."""
