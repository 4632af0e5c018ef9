"""Other programs, measured beside ours: PyTorch's step, the views of others."""
