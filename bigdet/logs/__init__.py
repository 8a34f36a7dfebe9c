"""What a run reports while it trains: logs, metrics.jsonl, TensorBoard and Weights & Biases."""
