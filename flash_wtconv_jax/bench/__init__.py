"""Benchmarks: each contender beside a named baseline, in one run."""
