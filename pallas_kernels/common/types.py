"""The types that several operators name. It imports no framework when it runs."""

from typing import TYPE_CHECKING, Any, Protocol, Self, Union

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.experimental import pallas as pl

Pair = tuple[int, int]
"""One integer for each axis of an image: rows, then columns."""
Taps = tuple["jax.Array", ...]
"""The kernels of a wavelet convolution: the base's first, then those of each level."""
Bands = tuple["jax.Array", ...]
"""Subbands of one level of a wavelet transform."""
Dtype = Union["np.dtype", str]
"""A dtype of NumPy, or the name of one, by which other frameworks tell theirs."""
Index = Union[int, "jax.Array"]
"""A number that is known when a kernel is traced, or a traced one."""
Slice = Union[slice, "pl.Slice"]
"""Part of an axis, as Pallas' `ds` returns it."""
Ref = Any
"""A place that a kernel reads or writes: a Pallas ref, a view of one, or an mbarrier.

Pallas has no public type that says what these can do.
"""
Tree = Any
"""A pytree: an array, or a container of pytrees."""
Json = dict[str, Any]
"""A JSON object."""
Keywords = dict[str, Any]
"""Keyword arguments that are handed on."""


class DeviceArray(Protocol):
    """An array of either framework, as launches read and return it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> Any:
        """Its dtype, the framework's own."""

    def sum(self, axis: int, /) -> Self:
        """The sum along an axis."""

    def __getitem__(self, index: Any, /) -> Self:
        """Some of it."""


Output = tuple[Any, ...]
"""The shape and the dtype of an output, and its strides where it is not contiguous."""
