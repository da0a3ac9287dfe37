"""Code of all operators: arguments, devices, dtypes, transformations, measurement, launchers."""
