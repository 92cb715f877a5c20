"""Apply a network to pictures and videos: inputs, predictor, output files.

The web page is in serving/, and exported networks are in export/.
"""
