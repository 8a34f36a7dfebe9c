"""Detectors: backbones, necks, heads, losses."""
