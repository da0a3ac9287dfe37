"""Kernels for GPUs, built by a C++ compiler and run on the CPU.

They are built from the same sources, and their threads are fibers: their results, though not their
speed, are tested where there is no such device.
"""
