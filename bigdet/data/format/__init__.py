"""The shard format: tars with index and manifest, where they are kept, and how they are read."""
