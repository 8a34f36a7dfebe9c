"""How weights are updated: sharding, precision, checkpoints. Knows nothing of detection."""
