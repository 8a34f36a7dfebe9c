"""Heads: predictions, losses, decoding."""
