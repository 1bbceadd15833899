"""Loggers beside TensorBoard: Weights & Biases, MLflow and SwanLab, each in a process of its own."""
