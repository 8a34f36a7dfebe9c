"""Necks: backbone features to pyramid features."""
