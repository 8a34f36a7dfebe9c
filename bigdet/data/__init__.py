"""From annotated images to batches: shards, order, transforms, stream."""
