"""Static cycles of TPU programs, from the compiler's own listing, on a machine without a TPU."""
