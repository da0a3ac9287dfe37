"""Depthwise sparse convolution, whose rooms stand beside those of the regular one."""
