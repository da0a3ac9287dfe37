"""Parameter tables and calls of the layers, for any layer library: what linen and nnx share."""
