"""Training, evaluation, prediction and checks as calls from Python, behind `semseg.train` and its three siblings.

Here: keywords become overrides, the run leaves the process as it found it, results become objects. What the modes do
lies in semseg/modes/, and prediction of single pictures in semseg/prediction/ (`semseg.load`).
"""
