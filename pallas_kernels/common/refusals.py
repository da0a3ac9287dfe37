"""The error by which an implementation refuses a call that another implementation may take."""

from collections.abc import Sequence


def refusal(reasons: Sequence[str]) -> NotImplementedError:
    """The error of an implementation that cannot take a call; `dispatch` then tries the next.

    Args:
        reasons: Phrases such as "3-D signals, 2-D alone", at least one.

    Example:
        >>> refusal(["3-D signals, 2-D alone", "an empty batch"])
        NotImplementedError('does not take 3-D signals, 2-D alone; an empty batch')
    """
    return NotImplementedError(f"does not take {'; '.join(reasons)}")


def unsupported_sizes(shape: Sequence[object]) -> list[str]:
    """The reasons why a kernel, whose sizes are positive numbers, does not take an array.

    Args:
        shape: The array's shape; its sizes are numbers or symbols of `jax.export`.

    Returns:
        A phrase, or none where a kernel can take the array.

    Example:
        >>> unsupported_sizes((0, 8, 8, 4))
        ['an empty array']
    """
    if not all(isinstance(size, int) for size in shape):
        return ["arrays of symbolic size"]
    return ["an empty array"] if 0 in shape else []


def refuse(reasons: Sequence[str]) -> None:
    """Raises `refusal(reasons)` if there are any reasons.

    Args:
        reasons: Phrases as `refusal` takes them; none if the implementation takes the call.

    Raises:
        NotImplementedError: There is at least one reason.

    Example:
        >>> refuse([])
    """
    if reasons:
        raise refusal(reasons)
