"""Tensor operations without state: boxes, random words, resizing, pooling."""
