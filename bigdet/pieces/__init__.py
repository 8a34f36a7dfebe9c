"""Named tensors on disk, in pieces: files that are written and read by ranges of numbers."""
