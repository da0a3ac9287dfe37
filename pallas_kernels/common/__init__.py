"""What the operators share: checks, devices, dtypes, transformations, measurement, launchers."""
