"""ucray."""
