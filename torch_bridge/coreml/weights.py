"""Parameters to export: of a checkpoint of any kind that this package reads, or random ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.common.types import Tree
from pallas_kernels.haar.filters import IS_HAAR, wavelet_name
from torch_bridge.coreml.program import Array

Params = dict[str, Array]


def of_layer(
    checkpoint: Path | None,
    channels: int | None,
    levels: int | None,
    kernel_size: int | None,
    seed: int,
) -> Params:
    """The parameters of a 2-D layer of Haar wavelets.

    Args:
        checkpoint: An Orbax folder, or a `.safetensors` or `.pth` file of any layout of layers;
            None draws the values that training starts from.
        channels: Number of channels; None is that of the checkpoint.
        levels: Wavelet levels; None is those of the checkpoint, 1 without one.
        kernel_size: Taps along an axis; None is those of the checkpoint, 5 without one.
        seed: What random values are drawn by.

    Returns:
        Parameters of a Flax `WTConv2d`.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It cannot be read, is that of something else, or of another size than asked for.
    """
    if checkpoint is None:
        if channels is None:
            raise ValueError("--channels is needed, or --checkpoint, which tells the channels")
        return _drawn(channels, 1 if levels is None else levels, kernel_size or 5, seed)
    from flash_wtconv_jax import checkpoints

    params = _read(checkpoint, "layer")
    kernel = params.get("base_kernel")
    if not isinstance(kernel, np.ndarray):
        holds = ", ".join(map(str, list(params)[:3]))
        advice = "; of a whole network say --model" if "stem" in params or "in1" in params else ""
        raise ValueError(f"{checkpoint} holds {holds}, expected a layer{advice}")
    if kernel.ndim != 4:
        raise ValueError(
            f"{checkpoint} holds a {kernel.ndim - 2}-D layer, expected a 2-D one: packages are of "
            "images"
        )
    with _misfits_in_one_line(checkpoint, "layer"):
        # A folder may hold anything, and the names of a layout are those that a layer has.
        checkpoints.to_torch({"params": params}, "published")
    found = {
        "--channels": (channels, kernel.shape[-1]),
        "--levels": (levels, sum(name.startswith("wavelet_kernel_") for name in params)),
        "--kernel-size": (kernel_size, kernel.shape[0]),
    }
    for option, (asked, own) in found.items():
        if asked not in (None, own):
            raise ValueError(
                f"{option} is {asked}, but {checkpoint} has {own}: leave the option out"
            )
    return params


def of_convnext(name: str, checkpoint: Path | None, seed: int) -> tuple[Params, Any]:
    """The parameters and the config of a WTConvNeXt or ConvNeXt of Haar wavelets.

    Args:
        name: The function of `flash_wtconv_jax.models` that makes one of its size.
        checkpoint: A folder or file that `models.load_network` reads; None draws parameters.
        seed: What they are drawn by.

    Returns:
        Parameters by dotted names, and the `ConvNeXtConfig`.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It cannot be read, or is that of another network.
    """
    from flax import nnx

    from flash_wtconv_jax import checkpoints, models

    make = getattr(models, name)
    if checkpoint is None:
        model = make(rngs=nnx.Rngs(seed))
    else:
        with _misfits_in_one_line(checkpoint, "network"):
            model = models.load_network(checkpoint)
        named = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))).config
        for field in ("depths", "dims", "levels", "kernel_sizes"):
            own, expected = getattr(model.config, field), getattr(named, field)
            if own != expected:
                raise ValueError(
                    f"--model is {name}, of {field} {expected}, but those of {checkpoint} are {own}"
                )
    if checkpoint is not None:
        _check_haar(checkpoint, model.config.wavelet)
    return flat(checkpoints.variables_of(model)), model.config


def of_transformer_net(checkpoint: Path | None, seed: int) -> Params:
    """The parameters of a TransformerNet by dotted names.

    Args:
        checkpoint: A folder or file that `checkpoints.load` reads; None draws parameters.
        seed: What they are drawn by.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It cannot be read, or is that of another network.
    """
    from flax import nnx

    from flash_wtconv_jax import checkpoints, models

    if checkpoint is None:
        model = models.TransformerNet(rngs=nnx.Rngs(seed))
    else:
        model = nnx.eval_shape(lambda: models.TransformerNet(rngs=nnx.Rngs(0)))
        params = _read(checkpoint, "network")
        with _misfits_in_one_line(checkpoint, "network"):
            checkpoints.load_into(model, {"params": params})
    return flat(checkpoints.variables_of(model))


def below(params: Params, name: str) -> Params:
    """The parameters whose names begin with a name and a dot, without it; none perhaps.

    Example:
        >>> below({"fc.bias": np.ones(1), "norm.bias": np.ones(1)}, "fc")
        {'bias': array([1.])}
    """
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)
    }


def flat(variables: Tree) -> Params:
    """The parameters in variables by dotted names, in float32."""
    from flash_wtconv_jax.checkpoints.names import flatten

    return {name: np.asarray(value, np.float32) for name, value in flatten(variables).items()}


def _read(checkpoint: Path, kind: str) -> dict[str, Tree]:
    """The parameters in a checkpoint of a kind, "layer" or "network", with Haar wavelets."""
    from flash_wtconv_jax import checkpoints

    with _misfits_in_one_line(checkpoint, kind):
        if checkpoint.is_dir():
            _check_haar(checkpoint, checkpoints.wavelet_of(checkpoint))
            variables: Tree = checkpoints.restore(checkpoint)
        else:
            state_dict = checkpoints.read_state_dict(checkpoint)
            _check_haar(checkpoint, checkpoints.recognise(state_dict).wavelet)
            variables = checkpoints.from_torch(state_dict)
    params: Tree = variables.get("params", variables)
    if not isinstance(params, dict):
        raise ValueError(f"{checkpoint} holds no parameters by name")
    return params


def _check_haar(checkpoint: Path, wavelet: str | None) -> None:
    """Raises for another wavelet; one that a checkpoint does not name is taken for Haar."""
    if wavelet is not None and wavelet_name(wavelet) not in IS_HAAR:
        raise ValueError(
            f"{checkpoint} has wavelet {wavelet}, expected haar, the only one of packages: train "
            "with it"
        )


@contextmanager
def _misfits_in_one_line(checkpoint: Path, kind: str) -> Iterator[None]:
    """Makes the list of all that does not fit a layout one line, which names the file."""
    try:
        yield
    except ValueError as error:
        head, *misfits = map(str.strip, str(error).splitlines())
        if not misfits:
            raise
        _, _, first = misfits[0].partition(": ")
        raise ValueError(
            f"{checkpoint}: {head}, such as {first}; save the weights of one {kind} alone"
        ) from error


def _drawn(channels: int, levels: int, kernel_size: int, seed: int) -> Params:
    """The values that training of a layer starts from."""
    rng = np.random.default_rng(seed)
    bound, taps = 1 / kernel_size, (kernel_size, kernel_size)

    def uniform(*shape: int) -> Array:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    params = {
        "base_kernel": uniform(*taps, 1, channels),
        "base_bias": uniform(channels),
        "base_scale": np.ones(channels, np.float32),
    }
    for i in range(levels):
        params[f"wavelet_kernel_{i}"] = uniform(*taps, 4, channels)
        params[f"wavelet_scale_{i}"] = np.full((4, channels), 0.1, np.float32)
    return params
