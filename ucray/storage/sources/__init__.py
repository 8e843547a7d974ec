"""Formats of source volumes: each module opens one, as an array of named axes that is read by slices."""
