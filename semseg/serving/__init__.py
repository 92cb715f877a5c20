"""The local web page and JSON endpoint of mode=serve.

The network behind it is a prediction.Predictor.
"""
