"""Checks of integer arguments. It imports no framework."""

import operator
from typing import SupportsIndex, cast

LARGEST = 2**31 - 1
"""The largest integer that operators take for anything that is counted or measured in samples."""


def checked_integer(value: object, name: str, *, least: int, most: int = LARGEST) -> int:
    """An integer argument as an int; NumPy integers are taken, a bool is not.

    Raises:
        ValueError: It is no integer, or it is less than `least` or greater than `most`.

    Example:
        >>> checked_integer(2, "stride", least=1)
        2
    """
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r}: expected an integer >= {least}")
    if number > most:
        raise ValueError(f"{name}={value!r}: expected an integer <= {most}")
    return number
