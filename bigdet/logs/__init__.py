"""Where a run says what it does: logging, metrics.jsonl, TensorBoard and Weights & Biases."""
