"""Tensors: loading, new rows, what is trained, the loss. Knows nothing of data files or Ray."""
