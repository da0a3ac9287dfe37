"""Functions on arrays: every operator, its kernels, its oracle, and the choice between them."""
