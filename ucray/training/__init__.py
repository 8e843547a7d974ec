"""Training: one step of each stage, the schedule, and the weights that come out."""
