"""The training engine: a loop that knows nothing of Ray, and the Ray workers around it."""
