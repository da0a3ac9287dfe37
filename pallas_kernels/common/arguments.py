"""Checks of arguments that every operator shares; each error names the argument."""

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.common.integers import checked_integer

P = ParamSpec("P")
R = TypeVar("R")

FLOATING = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that operators take."""

MOST_LEVELS = 63
"""Levels of a cascade; by then a sample is left of the longest axis that an array can have."""

Precision = str | jax.lax.Precision | None
"""The type of the argument `precision=`."""


def checked_eps(value: object, name: str = "eps") -> float:
    """The number that is added to a variance, as a float.

    Args:
        value: The argument.
        name: Its name, for the error.

    Raises:
        ValueError: It is no number that float32 holds as one greater than 0.

    Example:
        >>> checked_eps(1e-5)
        1e-05
    """
    number = math.nan
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        number = float(value)
    if not float(np.finfo(np.float32).tiny) <= number <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}={value!r}: expected a number greater than 0, such as 1e-5")
    return number


def checked_array(value: ArrayLike, name: str) -> jax.Array:
    """A floating-point argument as an array.

    Args:
        value: The argument as the caller gave it.
        name: The argument's name, for the error.

    Raises:
        ValueError: It is no array, or its dtype is none of float16, bfloat16, float32, float64.

    Example:
        >>> checked_array([1.0, 2.0], "x").shape
        (2,)
    """
    # Not `asarray` of an array: that takes the host longer than all other checks.
    try:
        x = value if isinstance(value, jax.Array) else jnp.asarray(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected an array, got {type(value).__name__}") from None
    if x.dtype not in FLOATING:
        raise ValueError(
            f"{name}: expected a floating-point array ({', '.join(FLOATING)}), got {x.dtype}; "
            "cast it first"
        )
    return x


def sharded(x: jax.Array) -> bool:
    """Whether an array is sharded over Explicit axes of a mesh.

    Example:
        >>> sharded(jnp.ones(3))
        False
    """
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def surely(compare: Callable[[int, int], bool], size: int, other: int) -> bool:
    """Whether two sizes compare so whatever the symbolic ones among them stand for.

    Args:
        compare: A comparison, such as `operator.lt`.
        size: The first size.
        other: The second.

    Example:
        >>> import operator
        >>> (n,) = jax.export.symbolic_shape("n")
        >>> surely(operator.lt, n, 1), surely(operator.lt, n, 3), surely(operator.lt, n, n + 1)
        (False, False, True)
    """
    try:
        return compare(size, other)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def checked_seed(value: object) -> int:
    """The argument `seed=` as an int of 64 bits, which `jax.random.key` takes.

    Raises:
        ValueError: It is no such integer.

    Example:
        >>> checked_seed(7)
        7
    """
    return checked_integer(value, "seed", least=-(2**63), most=2**63 - 1)


def checked_pair(value: object, name: str, *, least: int) -> tuple[int, int]:
    """An argument that is one integer for both axes of an image, or one for each, as two.

    Raises:
        ValueError: It is neither, or an integer is less than `least` or greater than `LARGEST`.

    Example:
        >>> checked_pair(2, "stride", least=1)
        (2, 2)
    """
    pair = value if isinstance(value, Sequence) and len(value) == 2 else (value, value)
    try:
        first, second = (checked_integer(each, name, least=least) for each in pair)
    except ValueError as error:
        expected = str(error).rpartition(": ")[2]
        raise ValueError(f"{name}={value!r}: {expected}, or two of them") from None
    return first, second


def checked_dtype(value: DTypeLike | None, name: str) -> np.dtype:
    """A dtype argument as NumPy's dtype.

    Raises:
        ValueError: It is none of the dtypes that operators take.

    Example:
        >>> checked_dtype("bfloat16", "dtype")
        dtype(bfloat16)
    """
    try:
        # NumPy takes None for its default.
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype not in FLOATING:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(FLOATING)}")
    return dtype


def checked_precision(value: Precision) -> jax.lax.Precision | None:
    """The argument `precision=` as JAX's enum.

    Raises:
        ValueError: JAX knows no precision of this name.

    Example:
        >>> checked_precision("highest").name
        'HIGHEST'
    """
    if value is None:
        return None
    try:
        return jax.lax.Precision(value)
    except (TypeError, ValueError):
        names = [p.name.lower() for p in jax.lax.Precision]
        raise ValueError(
            f"precision={value!r}: expected None, a jax.lax.Precision or one of {names}"
        ) from None


@cache
def remembered(check: Callable[P, R]) -> Callable[P, R]:
    """A check of hashable arguments that is made once for equal ones.

    Arguments that cannot be hashed are checked each time, as the check itself says that they are
    wrong; so are those that it raises for.

    Args:
        check: A function of its arguments alone.

    Returns:
        The same function.

    Example:
        >>> remembered(checked_precision)("highest").name
        'HIGHEST'
    """
    known = lru_cache(4096, typed=True)(check)

    @wraps(check)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            hash((args, *kwargs.values()))
        except TypeError:
            return check(*args, **kwargs)
        # They are hashable, as was just seen.
        return known(*args, **kwargs)  # type: ignore[arg-type]

    return call


def hashable(value: R) -> R:
    """An argument as caches, `nnx.jit` and `nnx.split` can hash it: lists become tuples.

    Example:
        >>> hashable([1, [2, 3]])
        (1, (2, 3))
    """
    return cast(R, tuple(map(hashable, value))) if isinstance(value, list | tuple) else value
