"""Code of all operators: checks, devices, dtypes, transformations, measurement, launchers."""
