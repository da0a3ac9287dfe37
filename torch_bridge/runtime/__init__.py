"""Devices, measurement, and kernels of other devices run on the CPU."""
