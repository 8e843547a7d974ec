"""The jobs on Ray."""
