"""Writes `.mlpackage` folders: a program of MIL operations, its interface and its metadata."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.common import versions
from pallas_kernels.common.files import replacing, writing
from torch_bridge.coreml.tools import quiet

PRECISIONS = "fp32", "fp16"
"""The dtype of weights and of computed values; arrays at the interface are float32 in both."""
LICENCE = "Apache-2.0 for the program; the weights have the licence of where they come from"

_PASSES = (
    "common::update_output_dtypes",
    "common::const_elimination",
    "common::const_deduplication",
    "common::noop_elimination",
    "common::dedup_op_and_var_names",
    "common::add_fp16_cast",
    "common::update_output_dtypes",
    "common::const_elimination",
    "common::cast_optimization",
    "common::dead_code_elimination",
)
"""The passes of coremltools that a program needs whose operations are fused already.

The others take several times as long; and `fuse_conv_scale` would push the weights before a layer
scale below what float16 holds well.
"""


class Input(NamedTuple):
    """An input of a program.

    Attributes:
        shape: Its default shape `(1, C, H, W)`.
        others: Other shapes that it may have.
        ranged: Whether H and W may be anything from 1 to twice those instead.
        image: Whether it is an RGB image with numbers from 0 to 255.
    """

    shape: tuple[int, int, int, int]
    others: tuple[tuple[int, int, int, int], ...] = ()
    ranged: bool = False
    image: bool = False

    @property
    def flexible(self) -> bool:
        """Whether it may have several shapes."""
        return self.ranged or bool(self.others)


class About(NamedTuple):
    """The metadata of a package.

    Attributes:
        kind: "convs", "whole" or the name of a network.
        shape: The default `(C, H, W)` of its input.
        precision: One of `PRECISIONS`.
        source_hash: `hash_of` the parameters that it was made of.
        levels: Wavelet levels, of a network those of its stages.
        kernel_size: Taps along an axis, of a network those of its stages.
        description: What it computes, in a sentence.
    """

    kind: str
    shape: tuple[int, int, int]
    precision: str
    source_hash: str
    levels: int | tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    description: str

    def metadata(self) -> dict[str, str]:
        """The package's own keys and what they hold."""
        channels, height, width = map(str, self.shape)
        return {
            "flash_wtconv.version": versions.package(),
            "flash_wtconv.kind": self.kind,
            "flash_wtconv.channels": channels,
            "flash_wtconv.height": height,
            "flash_wtconv.width": width,
            "flash_wtconv.levels": _listed(self.levels),
            "flash_wtconv.kernel_size": _listed(self.kernel_size),
            "flash_wtconv.precision": self.precision,
            "flash_wtconv.source_hash": self.source_hash,
        }


def hash_of(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of parameters: of names, shapes and values in float32, in whatever file.

    Example:
        >>> hash_of({"base_scale": np.ones(2)})[:8]
        'a4dc42a0'
    """
    digest = sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], np.float32)
        digest.update(f"{name} {array.shape} ".encode() + array.astype("<f4").tobytes())
    return digest.hexdigest()


def converted(
    inputs: Mapping[str, Input],
    build: Callable[..., Mapping[str, Any]],
    about: About,
    *,
    images: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Any:
    """A model of coremltools.

    Args:
        inputs: The inputs by name.
        build: Takes a MIL variable for each input by name, returns those of the outputs by name.
        about: What the package tells of itself.
        images: Names of outputs that are RGB images.
        labels: Of a classifier the classes, of which the only output is the probabilities.

    Returns:
        The model, not loaded; `save` writes it.

    Raises:
        ModuleNotFoundError: coremltools is not installed.
    """
    with quiet() as ct:
        program = _program(ct, inputs, build)
        names = [] if labels else [output.name for output in program.functions["main"].outputs]
        model = ct.convert(
            program,
            pass_pipeline=ct.PassPipeline(list(_PASSES), "flash_wtconv"),
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            compute_precision={
                "fp32": ct.precision.FLOAT32,
                "fp16": ct.precision.FLOAT16,
            }[about.precision],
            inputs=[_input_type(ct, name, one) for name, one in inputs.items()],
            outputs=[_output_type(ct, name, name in images) for name in names] or None,
            classifier_config=ct.ClassifierConfig(list(labels)) if labels else None,
            skip_model_load=True,
        )
        describe(model, about)
        return model


def describe(model: Any, about: About) -> None:
    """Writes into a model of coremltools what it tells of itself."""
    model.user_defined_metadata.update(about.metadata())
    model.short_description = about.description
    model.version = versions.package()
    model.author = "Flash WTConv"
    model.license = LICENCE


def save(path: Path, model: Any, *, force: bool) -> None:
    """Writes a model of coremltools as a package, whole or not at all.

    Args:
        path: A name that ends in `.mlpackage`.
        model: What `converted` returns.
        force: Whether a package that is there is replaced.

    Raises:
        FileExistsError: Something is at path and force is False.
        FileNotFoundError: There is no folder to write it into.
        OSError: It cannot be written, for want of space perhaps.
    """
    with replacing(path, force) as temporary, writing(path), quiet():
        model.save(str(temporary))


def _program(ct: Any, inputs: Mapping[str, Input], build: Callable[..., Mapping[str, Any]]) -> Any:
    """The program of MIL that `build` makes of its inputs."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, get_new_symbol

    placeholders = {}
    for name, one in inputs.items():
        shape = list(one.shape)
        if one.flexible:
            shape[2:] = get_new_symbol(), get_new_symbol()
        placeholders[name] = mb.placeholder(shape)
    program = Program()
    with Function(placeholders, opset_version=ct.target.iOS16) as function:
        outputs = build(**{name: function.inputs[name] for name in inputs})
        for name, value in outputs.items():
            if value.name != name:
                raise ValueError(f"output {name} is computed under the name {value.name}")
        function.set_outputs(list(outputs.values()))
    program.add_function("main", function)
    return program


def _input_type(ct: Any, name: str, one: Input) -> Any:
    shape: Any = one.shape
    if one.ranged:
        _, channels, height, width = one.shape
        sides = [ct.RangeDim(1, 2 * n, default=n) for n in (height, width)]
        shape = ct.Shape((1, channels, *sides))
    elif one.others:
        shape = ct.EnumeratedShapes([one.shape, *one.others], default=one.shape)
    if one.image:
        return ct.ImageType(name=name, shape=shape, color_layout=ct.colorlayout.RGB)
    return ct.TensorType(name=name, shape=shape, dtype=np.float32)


def _output_type(ct: Any, name: str, image: bool) -> Any:
    if image:
        return ct.ImageType(name=name, color_layout=ct.colorlayout.RGB)
    return ct.TensorType(name=name, dtype=np.float32)


def _listed(value: int | tuple[int, ...]) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
