"""Annotation formats to samples, one module each."""
