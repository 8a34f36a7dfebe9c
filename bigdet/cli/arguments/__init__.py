"""What each command takes, read before anything heavy is imported."""
