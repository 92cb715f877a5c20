"""Whole networks of other libraries, as SegmentationNetworks. A library is imported when its network is built."""
