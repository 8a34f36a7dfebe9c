"""Making shards: annotations of many sources to tars, in parallel, resumable, checked."""
