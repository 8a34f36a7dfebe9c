"""What ``bigdet/benchmark.py`` measures, a module for each part."""
