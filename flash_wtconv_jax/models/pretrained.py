"""Saves whole networks to folders, and loads them from checkpoints of any kind."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.models import convnext
from flash_wtconv_jax.models.segmenter import Segmenter
from pallas_kernels.common.files import replacing
from pallas_kernels.common.types import Json, Keywords, Tree

CONFIG_NAME = "network.json"
"""The file in an Orbax folder that `load_network` rebuilds the model from."""

# Options of a model that say how it is computed, not what it computes.
_EXECUTION = frozenset({"implementation", "conv_implementation", "precision", "remat"})


def save_network(folder: str | os.PathLike[str], model: convnext.ConvNeXt) -> None:
    """Writes an Orbax checkpoint and, inside it, the file that `load_network` needs.

    Args:
        folder: Folder to make.
        model: Any `models.ConvNeXt`.

    Raises:
        FileExistsError: The folder exists.
    """
    with replacing(Path(folder), force=False) as temporary:
        variables = checkpoints.variables_of(model)
        checkpoints.save(temporary, variables, wavelet=model.config.wavelet)
        (temporary / CONFIG_NAME).write_text(json.dumps(description(model), indent=2) + "\n")


def description(model: convnext.ConvNeXt) -> Json:
    """The content of the `network.json` from which `load_network` rebuilds a model."""
    if isinstance(model, Segmenter):
        options = {**_options(model.config), "decoder_dim": model.decoder_dim}
        return {"model": "Segmenter", "options": options}
    return {"model": "ConvNeXt", "options": _options(model.config)}


def load_network(path: str | os.PathLike[str]) -> convnext.ConvNeXt:
    """The model that a checkpoint belongs to, with its parameters.

    An Orbax folder may hold a `network.json`: an object that names the `model`, "ConvNeXt",
    "Segmenter" or a function of `flash_wtconv_jax.models` such as "wtconvnext_tiny", and its
    `options`, the fields of `ConvNeXtConfig` that differ. Everything else is read off the names and
    shapes of the parameters; a wavelet that nothing in the folder names is taken for Haar.

    Args:
        path: Folder that `save_network`, `flash-wtconv convert` or another Orbax writer has
            written, or a `.safetensors` or `.pth` file of any layout of whole networks; see
            `checkpoints.from_torch`. What a state dict does not tell, such as timm's `act_layer`,
            `norm_eps`, `output_stride` and `global_pool`, is taken for its default.

    Returns:
        The model with the parameters of the checkpoint.

    Raises:
        FileNotFoundError: There is nothing at path.
        ValueError: It is no checkpoint or that of no ConvNeXt, the JSON is not as above, or the
            parameters do not fit the model.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    wavelet = None
    if path.is_dir():
        variables, wavelet = checkpoints.restore(path), checkpoints.wavelet_of(path)
    else:
        state_dict = checkpoints.read_state_dict(path)
        wavelet = checkpoints.recognise(state_dict).wavelet
        variables = checkpoints.from_torch(state_dict, wavelet=wavelet)
    if not isinstance(variables, Mapping):
        raise ValueError(f"{path} holds a {type(variables).__name__}, expected arrays by name")
    # One for all steps of a training lies beside them.
    near = [path, *list(path.absolute().parents)[:2]] if path.is_dir() else []
    described = [folder / CONFIG_NAME for folder in near]
    config_path = next((file for file in described if file.is_file()), None)
    if config_path is not None:
        maker = _constructor(config_path)
    else:
        config = _config_of(variables, wavelet or "haar", path)
        maker = lambda: convnext.ConvNeXt(config, rngs=nnx.Rngs(0))  # noqa: E731
    model = nnx.eval_shape(maker)
    checkpoints.load_into(model, variables)
    return model


def _options(config: convnext.ConvNeXtConfig) -> Keywords:
    """The fields of a config that differ from their defaults, as JSON has them."""
    options = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in _EXECUTION:
            is_dtype = field.name in ("dtype", "param_dtype")
            options[field.name] = jnp.dtype(value).name if is_dtype else value
    return options


def _constructor(path: Path) -> Callable[[], convnext.ConvNeXt]:
    """The call that makes the model which a `network.json` describes."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, Mapping) or not isinstance(config.get("options", {}), Mapping):
        raise ValueError(f'{path} must hold {{"model": name, "options": {{…}}}}, got {config!r}')
    name, options = config.get("model"), dict(config.get("options", {}))
    makers = {**constructors(), "Segmenter": _segmenter}
    if not isinstance(name, str) or name not in makers:
        raise ValueError(f"{path} names the model {name!r}, expected one of {sorted(makers)}")
    known = {field.name for field in dataclasses.fields(convnext.ConvNeXtConfig)}
    known |= {"decoder_dim"} if name == "Segmenter" else set()
    if not known.issuperset(options):
        raise ValueError(f"{path} has unknown options {sorted(set(options) - known)}")
    wavelet = checkpoints.wavelet_of(path.parent, options.get("wavelet"))
    if wavelet is not None:
        options["wavelet"] = wavelet
    return lambda: makers[name](rngs=nnx.Rngs(0), **options)


def constructors() -> dict[str, Callable[..., convnext.ConvNeXt]]:
    """Functions that make networks, by the names that `network.json` and a training's settings use.

    Example:
        >>> sorted(constructors())[0]
        'ConvNeXt'
    """
    makers = {n: make for n, make in vars(convnext).items() if "convnext_" in n}
    return {"ConvNeXt": _convnext, **makers}


def _convnext(*, rngs: nnx.Rngs, **options: Any) -> convnext.ConvNeXt:
    return convnext.ConvNeXt(convnext.ConvNeXtConfig(**options), rngs=rngs)


def _segmenter(*, rngs: nnx.Rngs, decoder_dim: int, **options: Any) -> Segmenter:
    return Segmenter(convnext.ConvNeXtConfig(**options), decoder_dim, rngs=rngs)


def _config_of(variables: Mapping[str, Tree], wavelet: str, path: Path) -> convnext.ConvNeXtConfig:
    """The config of a model, read off its parameters."""
    params: Tree = variables.get("params", variables)
    try:
        stem, stages = params["stem"], _in_order(params["stages"])
        blocks = [_in_order(stage["blocks"]) for stage in stages]
        first = [block["conv_dw"] for block, *_ in blocks]
        plain = "kernel" in first[0]
        sizes = tuple(np.shape(conv["kernel" if plain else "base_kernel"])[0] for conv in first)
        dims = tuple(np.shape(block["norm"]["scale"])[0] for block, *_ in blocks)
        head = params.get("head", {})
        patches = stem.get("conv", stem.get("conv_0"))
        hidden = head["pre_logits"]["bias"] if "pre_logits" in head else None
        return convnext.ConvNeXtConfig(
            depths=tuple(map(len, blocks)),
            dims=dims,
            kernel_size=sizes[0] if len(set(sizes)) == 1 else sizes,
            levels=None if plain else tuple(map(_levels, first)),
            in_channels=np.shape(patches["kernel"])[2],
            num_classes=np.shape(head["fc"]["bias"])[0] if "fc" in head else 0,
            patch_size=np.shape(patches["kernel"])[0] if "conv" in stem else 4,
            stem_type=_stem_type(stem),
            first_downsample="downsample" in stages[0],
            conv_bias="bias" in patches,
            layer_scale=1e-6 if "gamma" in blocks[0][0] else None,
            use_grn="grn" in blocks[0][0]["mlp"],
            head_norm_first="norm_pre" in params,
            head_hidden_size=None if hidden is None else np.shape(hidden)[0],
            features_only=not head and "norm_pre" not in params,
            feature_norms="norms" in params,
            wavelet=wavelet,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no whole WTConvNeXt or ConvNeXt, whose parameters are stem, stages and "
            f"head; it holds {sorted(params)[:5]}"
        ) from error


def _stem_type(stem: Mapping[str, Tree]) -> str:
    if "conv" in stem:
        return "patch"
    if "conv_2" in stem:
        return "overlap_act"
    mid, dim = np.shape(stem["conv_1"]["kernel"])[2:]
    return "overlap" if mid == dim else "overlap_tiered"


def _in_order(tree: Mapping[str, Tree]) -> list[Tree]:
    """The values of `{"0": ..., "1": ..., ...}`."""
    return [tree[str(i)] for i in range(len(tree))]


def _levels(layer: Mapping[str, Tree]) -> int:
    return sum(name.startswith("wavelet_kernel_") for name in layer)
