"""Kernels made for other devices, built by a C++ compiler and run on the CPU.

They are the same sources, whose threads are fibers: what they compute is tested where no such
device is, their speed is not.
"""
