"""Rate and distortion of ucray and of its peers on the user's own volume."""
