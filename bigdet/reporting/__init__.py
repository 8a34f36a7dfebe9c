"""Runs that have been made, side by side."""
