"""Storage: source volumes, and the archive with its shards."""
