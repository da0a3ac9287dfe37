"""The errors of an implementation that cannot take a call which another implementation may take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


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


_NOTE = (
    "Where a kernel does not compile, plain JAX computes: say implementation='xla', or in the "
    "environment FLASH_WTCONV_{OPERATOR}_FWD=xla and FLASH_WTCONV_{OPERATOR}_BWD=xla, such as "
    "FLASH_WTCONV_WTCONV_FWD=xla; an MLP that nothing differentiates has FLASH_WTCONV_MLP_WHOLE=xla"
)


@contextmanager
def naming_xla() -> Iterator[None]:
    """Adds to what a kernel's trace raises how plain JAX computes in its place.

    Example:
        >>> with naming_xla():
        ...     pass
    """
    try:
        yield
    # Compilers fail in their own ways.
    except Exception as error:
        error.add_note(_NOTE)
        raise


class KernelError(RuntimeError):
    """A kernel that does not compile or load on this machine.

    Attributes:
        log: The text of the compiler or driver.

    Example:
        >>> KernelError("NVRTC could not compile", "kernels.cu(1): error").log
        'kernels.cu(1): error'
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}:\n{log}")
        self.log = log


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Makes whatever a compiler or a driver raises inside a block a `KernelError`.

    Args:
        what: What is compiled or loaded, such as "a Triton kernel".

    Raises:
        KernelError: Something was raised.

    Example:
        >>> with compiling("a Triton kernel"):
        ...     pass
    """
    try:
        yield
    except KernelError:
        raise
    # Compilers and drivers fail in their own ways.
    except Exception as error:
        message = f"{what} does not compile or load"
        raise KernelError(message, f"{type(error).__name__}: {error}") from error
