"""Weights that a detector starts from or is converted from."""
