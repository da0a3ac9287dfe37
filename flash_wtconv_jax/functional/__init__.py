"""Parameter tables, checks and calls of the layers, which linen and nnx share."""
