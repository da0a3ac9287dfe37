"""The tables of names: every tensor's name and order of axes, in PyTorch and here.

A layout is a tuple of rules, one a tensor. Both directions, the recognition of a layout and every
error message are read off these tables; to add a layout, add a table.

Names hold placeholders: `{i}` a wavelet level, `{s}` a stage, `{b}` a block. Shapes are written in
symbols, PyTorch's channel `4 * c + s` as `(c band)`; `k*` stands for one symbol a spatial axis and
`1*` for one 1 a spatial axis. A symbol means the same number in all tensors of a state dict; in
whole models it carries its stage, `c{s}`; `{p}` is the stage before and `{n}` the last one.
"""

import re
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Rule:
    """One tensor of a layout.

    Attributes:
        torch: Its name in the PyTorch state dict.
        torch_shape: Its shape there.
        ours: Its name in our params, nested names joined by dots; empty for a frozen tensor.
        ours_shape: Its shape there, the same symbols in another order.
        group: Tensors of a named group may be absent, but then all of them; "" is required.
        frozen: The values that a frozen tensor must hold: "analysis" or "synthesis" filters,
            "ones", or "anything" for a tensor that is dropped.
        first_stage: The first stage that has the tensor.
    """

    torch: str
    torch_shape: str
    ours: str = ""
    ours_shape: str = ""
    group: str = ""
    frozen: str = ""
    first_stage: int = 0


@dataclass(frozen=True)
class Table:
    """The rules of one layout for one number of spatial axes."""

    layout: str
    ndim: int
    rules: tuple[Rule, ...]


PUBLISHED_NAMES = (
    "base_conv.weight",
    "base_conv.bias",
    "base_scale.weight",
    "wavelet_convs.{i}.weight",
    "wavelet_scale.{i}.weight",
)
FAST_NAMES = ("base_weight", "base_bias", "base_scale", "wt_weights.{i}", "wt_scales.{i}")
"""The same tensors in the same order, of the same shapes."""


def _wtconv(
    names: tuple[str, ...], prefix: str = "", stage: str = "", bias: str = "bias"
) -> tuple[Rule, ...]:
    """The trained tensors of one WTConv layer, which may stand inside a stage of a model."""
    c, k = f"c{stage}", f"k{stage}*"
    theirs = [prefix + name for name in names]
    return (
        Rule(theirs[0], f"{c} 1 {k}", f"{prefix}base_kernel", f"{k} 1 {c}"),
        Rule(theirs[1], c, f"{prefix}base_bias", c, group=bias),
        Rule(theirs[2], f"1 {c} 1*", f"{prefix}base_scale", c),
        Rule(theirs[3], f"({c} band) 1 {k}", f"{prefix}wavelet_kernel_{{i}}", f"{k} band {c}"),
        Rule(theirs[4], f"1 ({c} band) 1*", f"{prefix}wavelet_scale_{{i}}", f"band {c}"),
    )


def _filters(prefix: str = "", stage: str = "") -> tuple[Rule, ...]:
    """The frozen tensors that the published layer saves beside the trained ones."""
    shape = f"(c{stage} band) 1 f*"
    return (
        Rule(f"{prefix}wt_filter", shape, frozen="analysis"),
        Rule(f"{prefix}iwt_filter", shape, frozen="synthesis"),
        # Saved by layers with a stride > 1 alone; it is constant, so nothing of it is kept.
        Rule(f"{prefix}stride_filter", f"c{stage} 1 1*", group="stride", frozen="ones"),
    )


def _norm(
    theirs: str, ours: str, c: str, group: str = "", first_stage: int = 0
) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.weight", c, f"{ours}.scale", c, group, first_stage=first_stage),
        Rule(f"{theirs}.bias", c, f"{ours}.bias", c, group, first_stage=first_stage),
    )


def _linear(name: str, inside: str, outside: str, group: str = "") -> tuple[Rule, ...]:
    return (
        Rule(
            f"{name}.weight", f"{outside} {inside}", f"{name}.kernel", f"{inside} {outside}", group
        ),
        Rule(f"{name}.bias", outside, f"{name}.bias", outside, group),
    )


_BLOCK = "stages.{s}.blocks.{b}"
_CONV_DW = f"{_BLOCK}.conv_dw"


def _model(conv_dw: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """A whole (WT)ConvNeXt in timm's names around the rules of its depthwise convolutions."""
    return (
        Rule("stem.0.weight", "c0 in p q", "stem.conv.kernel", "p q in c0"),
        Rule("stem.0.bias", "c0", "stem.conv.bias", "c0", "conv_bias"),
        *_norm("stem.1", "stem.norm", "c0"),
        *_norm("stages.{s}.downsample.0", "stages.{s}.downsample.norm", "c{p}", first_stage=1),
        Rule(
            "stages.{s}.downsample.1.weight",
            "c{s} c{p} u{s} v{s}",
            "stages.{s}.downsample.conv.kernel",
            "u{s} v{s} c{p} c{s}",
            first_stage=1,
        ),
        Rule(
            "stages.{s}.downsample.1.bias",
            "c{s}",
            "stages.{s}.downsample.conv.bias",
            "c{s}",
            "conv_bias",
            first_stage=1,
        ),
        *conv_dw,
        *_norm(f"{_BLOCK}.norm", f"{_BLOCK}.norm", "c{s}"),
        *_linear(f"{_BLOCK}.mlp.fc1", "c{s}", "h{s}"),
        *_norm(f"{_BLOCK}.mlp.grn", f"{_BLOCK}.mlp.grn", "h{s}", "grn"),
        *_linear(f"{_BLOCK}.mlp.fc2", "h{s}", "c{s}"),
        Rule(f"{_BLOCK}.gamma", "c{s}", f"{_BLOCK}.gamma", "c{s}", "gamma"),
        *_norm("head.norm", "head.norm", "c{n}", "head.norm"),
        *_linear("head.fc", "c{n}", "classes", "head.fc"),
    )


_WTCONVNEXT = _model(
    (
        *_wtconv(PUBLISHED_NAMES, f"{_CONV_DW}.", "{s}", "conv_bias"),
        *_filters(f"{_CONV_DW}.", "{s}"),
    )
)
_CONVNEXT = _model(
    (
        Rule(f"{_CONV_DW}.weight", "c{s} 1 k{s}*", f"{_CONV_DW}.kernel", "k{s}* 1 c{s}"),
        Rule(f"{_CONV_DW}.bias", "c{s}", f"{_CONV_DW}.bias", "c{s}", "conv_bias"),
    )
)


def _conv(theirs: str, ours: str, before: str, after: str, k: str) -> tuple[Rule, ...]:
    return (
        Rule(
            f"{theirs}.weight", f"{after} {before} {k}", f"{ours}.kernel", f"{k} {before} {after}"
        ),
        Rule(f"{theirs}.bias", after, f"{ours}.bias", after),
    )


def _conv_norm(conv: str, norm: str, before: str, after: str, k: str = "k*") -> tuple[Rule, ...]:
    """A convolution of TransformerNet and the instance normalisation that follows it."""
    return (
        *_conv(f"{conv}.conv2d", conv, before, after, k),
        *_norm(norm, norm, after),
        # Saved by PyTorch up to 0.3: averages over the training, which nothing is computed with.
        Rule(f"{norm}.running_mean", after, group="running", frozen="anything"),
        Rule(f"{norm}.running_var", after, group="running", frozen="anything"),
    )


_TRANSFORMER_NET = (
    *_conv_norm("conv1", "in1", "in", "c1", "m*"),
    *_conv_norm("conv2", "in2", "c1", "c2"),
    *_conv_norm("conv3", "in3", "c2", "c3"),
    *chain.from_iterable(
        (
            *_conv_norm(f"res{b}.conv1", f"res{b}.in1", "c3", f"h{b}"),
            *_conv_norm(f"res{b}.conv2", f"res{b}.in2", f"h{b}", "c3"),
        )
        for b in range(1, 6)
    ),
    *_conv_norm("deconv1", "in4", "c3", "c4"),
    *_conv_norm("deconv2", "in5", "c4", "c5"),
    *_conv("deconv3.conv2d", "deconv3", "c5", "out", "m*"),
)

# Where two tables fit equally well the first is taken: 2-D before 1-D, published before fast.
TABLES: tuple[Table, ...] = (
    *(Table("published", d, (*_wtconv(PUBLISHED_NAMES), *_filters())) for d in (2, 1, 3)),
    *(Table("fast", d, _wtconv(FAST_NAMES)) for d in (2, 1, 3)),
    Table("wtconvnext", 2, _WTCONVNEXT),
    # The baseline model of the same file format: plain depthwise convolutions inside.
    Table("wtconvnext", 2, _CONVNEXT),
    Table("transformer_net", 2, _TRANSFORMER_NET),
)

LAYOUTS: tuple[str, ...] = tuple(dict.fromkeys(table.layout for table in TABLES))
"""Names of the layouts: "published", "fast", "wtconvnext" and "transformer_net"."""


def pattern_of(template: str) -> re.Pattern[str]:
    """The regular expression of a template of names, each placeholder a named group."""
    # Three digits: more levels, stages or blocks than anyone has, and few enough to enumerate.
    index = r"(?P<\1>0|[1-9][0-9]{0,2})"
    return re.compile(re.sub(r"\\{(\w)\\}", index, re.escape(template)))


def groups_of(shape: str, ndim: int) -> tuple[tuple[str, ...], ...]:
    """A shape in symbols, axis by axis: `"(c band) 1*"` in 1-D is `(("c", "band"), ("1",))`."""
    axes = re.findall(r"\([^)]*\)|\S+", shape)
    return tuple(chain.from_iterable(_expand(axis, ndim) for axis in axes))


def _expand(axis: str, ndim: int) -> list[tuple[str, ...]]:
    if not axis.endswith("*"):
        return [tuple(axis.strip("()").split())]
    symbol = axis[:-1]
    return [("1",) if symbol == "1" else (f"{symbol}_{a}",) for a in range(ndim)]
