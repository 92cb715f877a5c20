"""A network that is shown pictures: inputs, predictor, output files, videos.

The web page lives in serving/, exported networks in export/.
"""
