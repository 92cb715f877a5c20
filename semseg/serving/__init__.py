"""The local web page and JSON endpoint of mode=serve, which use a prediction.Predictor."""
