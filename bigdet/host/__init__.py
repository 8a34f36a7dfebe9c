"""The host that a process runs on: its limits, errors, locks, launchers and network."""
