"""The arguments of each command, parsed before anything slow is imported."""
