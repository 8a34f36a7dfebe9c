"""What ``bigdet/cli/benchmark.py`` measures, a module for each part."""
