"""Detections of a model over a split, and their AP."""
