"""Warnings for names that were renamed. Imports neither jax nor torch."""

import warnings


def warn_renamed(module: str, old: str, new: str, *, removed_in: str) -> None:
    """Warns that a name of a module is an alias, from inside the module's `__getattr__`.

    The warning points at the line that asked the module for the old name.

    Args:
        module: The module's name.
        old: The deprecated name.
        new: The name that replaces it in the same module.
        removed_in: The version of this package that no longer has the old name.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_renamed("flash_wtconv_jax", "Conv2D", "Conv2d", removed_in="0.2")
        >>> print(caught[0].message)
        flash_wtconv_jax.Conv2D is now flash_wtconv_jax.Conv2d; the old name is removed in 0.2
    """
    warnings.warn(
        f"{module}.{old} is now {module}.{new}; the old name is removed in {removed_in}",
        DeprecationWarning,
        stacklevel=3,
    )
