"""Phases, the loop, schedules and metrics."""
