"""The parts of an operator's calls that all operators of PyTorch share.

`pick` of an operator tells what computes a call as a text, which a traced program holds: the name
of an implementation, its parameters, and whether another may compute in its place.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from pallas_kernels.common.refusals import KernelError
from pallas_kernels.dispatch import Choice, Operator, Request, forget, until_forgotten
from pallas_kernels.dispatch.backend import Implementation, Problem
from pallas_kernels.dispatch.tuner import Measurement
from torch_bridge.runtime.device import kind

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])

ELSE = "else"
"""The last word of such a text where another implementation may compute."""
FAILED: set[tuple[str, str]] = set()
"""Operators and their implementations that did not compile or load in this process; rules leave
them out."""

_END = 20
"""Lines of a compiler's log that errors tell."""


def constant(function: Function) -> Function:
    """Marks a function whose result is a constant of a traced program.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler to do it, which
    takes a second that who compiles nothing need not wait for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def static(implementation: Choice) -> str | tuple[str, ...] | None:
    """A filter as strings and tuples of them, which every program and file can hold.

    Example:
        >>> static(["triton", "eager"])
        ('triton', 'eager')
    """
    if implementation is None or isinstance(implementation, str):
        return None if implementation is None else str(implementation)
    return tuple(map(str, implementation))


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, as NumPy and JAX have it.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def picked(
    operator: Operator,
    filters: tuple[Choice, Choice],
    device: torch.device,
    problem: Problem,
    measurement: Callable[..., Measurement],
    *times_depend_on: Hashable,
    differentiated: bool,
) -> tuple[str, str]:
    """Picks what computes a call forward and backward, each as a text.

    Args:
        operator: The operator.
        filters: The filters on the implementations of both directions.
        device: Where it computes.
        problem: The call.
        measurement: Makes, of a direction, the problem, the device and the rest, what runs and
            times a candidate.
        *times_depend_on: The rest.
        differentiated: Whether there is a backward pass. Where there is none nothing is asked for
            it, and the forward pass's choice is told twice.

    Raises:
        ValueError: An unknown or empty filter, or such a name in the environment's variable.
        NotImplementedError: No allowed implementation can run here; says why for each. Or
            `torch.func` differentiates, and what would run is a custom operator.
    """
    where = device.type, kind(device)
    fwd = operator.request("fwd", filters[0], *where)
    bwd = operator.request("bwd", filters[1], *where) if differentiated else None
    found = _picked(fwd, bwd, device, problem, measurement, *times_depend_on)
    check_func(found)
    return found


@until_forgotten
def _picked(
    fwd: Request,
    bwd: Request | None,
    device: torch.device,
    problem: Problem,
    measurement: Callable[..., Measurement],
    *times_depend_on: Hashable,
) -> tuple[str, str]:
    """The result of `picked`, by the requests of its directions: a warm call looks it up alone."""

    def one(request: Request) -> str:
        return chosen(request, device, problem, measurement, *times_depend_on)

    first = one(fwd)
    return first, first if bwd is None else one(bwd)


def chosen(
    request: Request,
    device: torch.device,
    problem: Problem,
    measurement: Callable[..., Measurement],
    *times_depend_on: Hashable,
) -> str:
    """Picks what computes one direction of a call, as a text; arguments as `picked` has them."""
    operator, direction = request.operator, request.direction
    found = request.choose(problem, measurement, direction, problem, device, *times_depend_on)
    text = str(found)
    if request.names is not None:
        return text
    if (operator.name, found.implementation) in FAILED:
        text = following(operator, direction, device, problem)
    # Nobody named it, so another may compute in its place where it does not compile.
    return f"{text} {ELSE}"


def check_func(picked: Sequence[str]) -> None:
    """Raises `NotImplementedError` where `torch.func` differentiates what is no plain PyTorch."""
    if differentiated_by_func() and names(picked) != ["eager"]:
        raise NotImplementedError(
            f"torch.func differentiates what {' and '.join(names(picked))} would compute, and "
            "PyTorch has no way yet to tell it of custom operators: use implementation='eager', or "
            "torch.autograd.grad"
        )


def computed(
    operator: Operator,
    direction: str,
    text: str,
    device: torch.device,
    problem: Problem,
    compute: Callable[[Any, dict[str, int]], Result],
) -> Result:
    """The result of what was picked, or of the next implementation where it does not compile.

    Args:
        operator: The operator.
        direction: One of its directions.
        text: What was picked.
        device: Where it computes.
        problem: The call.
        compute: Calls an implementation, with its parameters, outside of `autocast`.

    Raises:
        NotImplementedError: It does not take the sizes: a traced program was made for others.
        KernelError: It does not compile or load, and was named.
    """
    name, config, replaceable = parsed(text)
    if replaceable and (operator.name, name) in FAILED:
        name, config = following(operator, direction, device, problem), {}
    module: Implementation = operator.module(name)
    module.check(direction, problem)
    try:
        with without_autocast(device):
            return compute(module, config)
    except KernelError as error:
        instead = following(operator, direction, device, problem, besides=name)
        # Or the environment named it.
        if not replaceable or operator.request(direction, None, device.type).names is not None:
            raise KernelError(
                f"{operator.argument.format(direction=direction)}={name!r} of {operator.name} does "
                f"not compile or load here: name {instead!r} in its place, or None for what does; "
                "the log ends with",
                "\n".join(error.log.splitlines()[-_END:]),
            ) from error
        FAILED.add((operator.name, name))
        forget()
        first = error.log.strip().partition("\n")[0]
        warnings.warn(
            f"{name} of {operator.name} does not compile or load here, {instead} computes in its "
            f"place: {first}",
            RuntimeWarning,
            stacklevel=2,
        )
    return computed(operator, direction, f"{instead} {ELSE}", device, problem, compute)


def following(
    operator: Operator,
    direction: str,
    device: torch.device,
    problem: Problem,
    besides: str = "",
) -> str:
    """The first of the device's rule that has not failed and can run.

    Args:
        operator: The operator.
        direction: One of its directions.
        device: Where it computes.
        problem: The call.
        besides: One more that is left out.
    """
    rule = operator.rule.get(device.type, operator.rule["cpu"])
    left = [name for name in rule if (operator.name, name) not in FAILED and name != besides]
    return operator.pick(direction, left, device.type, problem)


def parsed(text: str) -> tuple[str, dict[str, int], bool]:
    """The implementation, its parameters, and whether another may replace it.

    Example:
        >>> parsed("eager"), parsed("triton columns=2 else")
        (('eager', {}, False), ('triton', {'columns': 2}, True))
    """
    name, *parameters = text.split()
    pairs = (parameter.split("=") for parameter in parameters if parameter != ELSE)
    return name, {key: int(value) for key, value in pairs}, ELSE in parameters


def names(picked: Iterable[str]) -> list[str]:
    """The names of implementations without their parameters, each once.

    Example:
        >>> names(("triton columns=2", "triton"))
        ['triton']
    """
    return sorted({text.split()[0] for text in picked})


@constant
def differentiated_by_func() -> bool:
    """Whether `torch.func` takes derivatives here, of a traced program where it is traced."""
    levels = get_interpreter_stack() or ()
    return any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in levels)


def known(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Sizes and strides as numbers: of a traced program, those that it is traced with.

    Asking for them leaves no guard: the program takes other sizes as before. Older versions of
    PyTorch (2.11) cannot be asked; then there is one sample of each channel, whose number the
    program is bound to, and no strides.

    Example:
        >>> known(torch.zeros(2, 3, 4))
        ((2, 3, 4), (12, 4, 1))
    """
    if not torch.compiler.is_compiling():
        return tuple(x.shape), x.stride()
    if not tells_sizes():
        return (1, index(x.shape[1]), *(1,) * (x.ndim - 2)), None
    return tuple(map(number, x.shape)), tuple(map(number, x.stride()))


def channels_last(strides: tuple[int, ...]) -> bool:
    """Whether channels are nearer to each other than columns, as strides `(N, C, *spatial)` tell.

    Example:
        >>> channels_last(torch.zeros(2, 3, 4, 5).stride())
        False
        >>> channels_last(torch.zeros(2, 4, 5, 3).movedim(-1, 1).stride())
        True
    """
    return strides[1] < strides[-1]


def number(size: int) -> int:
    """A size as a number: of a traced program, that which it is traced with, see `known`.

    Example:
        >>> number(3)
        3
    """
    if not torch.compiler.is_compiling():
        return size
    if not tells_sizes():
        return index(size)
    # A size that depends on data counts as 1.
    from torch.fx.experimental.symbolic_shapes import optimization_hint as hint

    return hint(size, 1)


def tells_sizes() -> bool:
    """Whether this PyTorch tells the sizes that a program is traced with: from 2.12 on.

    Example:
        >>> tells_sizes() in (True, False)
        True
    """
    from torch.fx.experimental import symbolic_shapes

    return hasattr(symbolic_shapes, "optimization_hint")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """An implementation chooses its own dtypes, in a backward pass inside `autocast` too."""
    # PyTorch knows no autocast of tensors without data.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x, and of folded taps: float64 of its own kind, else float32.

    Example:
        >>> accumulation_dtype(torch.zeros(1, dtype=torch.float16))
        torch.float32
    """
    # Not `torch.promote_types`, which would become a node of an exported program.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def summed(dy: Tensor) -> Tensor:
    """The gradient of a bias `[C]`, for dy `[N, C, *spatial]`, in `accumulation_dtype`.

    It is summed in two steps: of all at once PyTorch makes a sum that is twice as slow, and of the
    many rows of a channels-last image one that takes up to an input's memory.

    Example:
        >>> summed(torch.ones(2, 3, 4, 5))
        tensor([40., 40., 40.])
    """
    first = tuple(range(2, dy.ndim)) if dy.is_contiguous() else (-1,)
    rows = dy.sum(first, dtype=accumulation_dtype(dy))
    return rows.sum((0, *range(2, rows.ndim)))


def formatted(y: Tensor, x: Tensor) -> Tensor:
    """A tensor of x's shape in the memory format that `torch.empty_like(x)` has."""
    like = torch.empty_like(x, device="meta")
    return y if y.stride() == like.stride() else torch.empty_like(x).copy_(y)


def examples(values: Sequence[Tensor], in_dims: Sequence[int | None], i: int) -> list[Tensor]:
    """One example of each of some arguments of `torch.vmap`, see `example`."""
    return [example(value, dim, i) for value, dim in zip(values, in_dims, strict=True)]


def example(value: Any, in_dim: int | None, i: int) -> Any:
    """One example of an argument of `torch.vmap`, or the argument where it has no such axis.

    Example:
        >>> example(torch.tensor([[1, 2], [3, 4]]), 1, 0).tolist(), example("ieee", None, 0)
        ([1, 3], 'ieee')
    """
    return value if in_dim is None else value.select(in_dim, i)
