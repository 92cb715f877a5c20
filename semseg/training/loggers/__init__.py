"""Where metrics go: the CSV log, TensorBoard, Weights & Biases, MLflow."""
