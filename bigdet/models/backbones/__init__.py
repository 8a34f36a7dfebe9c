"""Backbones: one file for each family, and `build.py`, which builds one by its name."""
