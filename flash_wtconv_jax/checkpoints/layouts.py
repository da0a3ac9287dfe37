"""The tables of names: every tensor's name and order of axes, in PyTorch and here.

A layout is a tuple of parts, a part a tuple of alternatives, of which a state dict follows one, and
an alternative a tuple of rules, one a tensor. Both directions, the recognition of a layout and
every error message are read off these tables; to add a layout, add a table.

Names hold placeholders: `{i}` a wavelet level, `{s}` a stage, `{b}` a block. Shapes are written in
symbols, PyTorch's channel `4 * c + s` as `(c band)`; `k*` stands for one symbol a spatial axis and
`1*` for one 1 a spatial axis. A symbol means the same number in all tensors of a state dict; in
whole models it carries its stage, `c{s}`; `{p}` is the stage before and `{n}` the last one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain


@dataclass(frozen=True)
class Rule:
    """One tensor of a layout.

    Attributes:
        torch: Its name in the PyTorch state dict.
        torch_shape: Its shape there.
        ours: Its name in our params, nested names joined by dots; empty for a frozen tensor.
        ours_shape: Its shape there, the same symbols in another order.
        group: Tensors of a named group may be absent, but then all of them; "" is required. A
            tensor of several groups, parted by spaces, is there where they all are.
        frozen: The values that a frozen tensor must hold: "analysis" or "synthesis" filters,
            "ones", or "anything" for a tensor that is dropped.
        first_stage: The first stage that has the tensor.
        scaled_by: The tensor here, by its name, that ours is multiplied by where theirs is not:
            theirs is our product with it.
    """

    torch: str
    torch_shape: str
    ours: str = ""
    ours_shape: str = ""
    group: str = ""
    frozen: str = ""
    first_stage: int = 0
    scaled_by: str = ""


Rules = tuple[Rule, ...]
Part = tuple[Rules, ...]


@dataclass(frozen=True)
class Table:
    """One layout for one number of spatial axes: its parts, and the alternatives of each."""

    layout: str
    ndim: int
    parts: tuple[Part, ...]


PUBLISHED_NAMES = (
    "base_conv.weight",
    "base_conv.bias",
    "base_scale.weight",
    "wavelet_convs.{i}.weight",
    "wavelet_scale.{i}.weight",
)
FAST_NAMES = ("base_weight", "base_bias", "base_scale", "wt_weights.{i}", "wt_scales.{i}")
"""The same tensors in the same order, of the same shapes."""
METAL_NAMES = (
    "base_conv.weight",
    "base_conv.bias",
    "base_scale",
    "wavelet_convs.{i}.weight",
    "wavelet_scales.{i}",
)
"""Those of the fast variant for Apple GPUs, which adds the bias after it has scaled."""


def _wtconv(
    names: tuple[str, ...], theirs: str = "", ours: str = "", stage: str = "", bias: str = "bias"
) -> Rules:
    """The trained tensors of one WTConv layer, which may stand inside a stage of a model."""
    c, k = f"c{stage}", f"k{stage}*"
    torch = [theirs + name for name in names]
    scaled_by = f"{ours}base_scale" if names is METAL_NAMES else ""
    return (
        Rule(torch[0], f"{c} 1 {k}", f"{ours}base_kernel", f"{k} 1 {c}"),
        Rule(torch[1], c, f"{ours}base_bias", c, group=bias, scaled_by=scaled_by),
        Rule(torch[2], f"1 {c} 1*", f"{ours}base_scale", c),
        Rule(torch[3], f"({c} band) 1 {k}", f"{ours}wavelet_kernel_{{i}}", f"{k} band {c}"),
        Rule(torch[4], f"1 ({c} band) 1*", f"{ours}wavelet_scale_{{i}}", f"band {c}"),
    )


def _filters(prefix: str = "", stage: str = "") -> Rules:
    """The frozen tensors that the published layer saves beside the trained ones."""
    shape = f"(c{stage} band) 1 f*"
    return (
        Rule(f"{prefix}wt_filter", shape, frozen="analysis"),
        Rule(f"{prefix}iwt_filter", shape, frozen="synthesis"),
        # Saved by layers with a stride > 1 alone; it is constant, so nothing of it is kept.
        Rule(f"{prefix}stride_filter", f"c{stage} 1 1*", group="stride", frozen="ones"),
    )


def _norm(
    theirs: str,
    ours: str,
    c: str,
    group: str = "",
    first_stage: int = 0,
    names: Sequence[str] = ("weight", "bias"),
    before: str = "",
) -> Rules:
    """A scale and a bias, whose axis of channels PyTorch may have axes of size 1 `before`."""
    return tuple(
        Rule(f"{theirs}.{name}", before + c, f"{ours}.{own}", c, group, first_stage=first_stage)
        for name, own in zip(names, ("scale", "bias"), strict=True)
    )


def _linear(
    theirs: str, ours: str, inside: str, outside: str, group: str = "", window: str = ""
) -> Rules:
    """A linear layer, which PyTorch may write as a convolution with a `window` of size 1."""
    return (
        Rule(
            f"{theirs}.weight",
            f"{outside} {inside}{window}",
            f"{ours}.kernel",
            f"{inside} {outside}",
            group,
        ),
        Rule(f"{theirs}.bias", outside, f"{ours}.bias", outside, group),
    )


def _patches(
    theirs: str,
    ours: str,
    before: str,
    after: str,
    window: str = "p q",
    group: str = "",
    first_stage: int = 0,
) -> Rules:
    """A convolution of the stem or of a downsampling, all of which have a bias, or none."""
    return (
        Rule(
            f"{theirs}.weight",
            f"{after} {before} {window}",
            f"{ours}.kernel",
            f"{window} {before} {after}",
            group,
            first_stage=first_stage,
        ),
        Rule(
            f"{theirs}.bias",
            after,
            f"{ours}.bias",
            after,
            f"{group} conv_bias".strip(),
            first_stage=first_stage,
        ),
    )


@dataclass(frozen=True)
class _Names:
    """The names that one code gives to the parts of a (WT)ConvNeXt, and the heads that it makes.

    Attributes:
        stem: What stands before the places in the sequence of the stem.
        first_downsample: The downsampling in front of the first stage; empty where there is none.
        downsample: Those in front of the others.
        block: A block; the names below stand inside of it.
        conv_dw: The depthwise convolution.
        fc1: The linear layer that widens.
        fc2: The one that narrows.
        grn: The global response normalisation, and its scale and bias.
        heads: What follows the stages, in alternatives.
    """

    stem: str
    first_downsample: str
    downsample: str
    block: str
    conv_dw: str
    fc1: str
    fc2: str
    grn: tuple[str, str, str]
    heads: Part


_HEAD = _norm("head.norm", "head.norm", "c{n}", "head.norm")
_FC = _linear("head.fc", "head.fc", "c{n}", "classes", "head.fc")

_TIMM = _Names(
    stem="stem.",
    first_downsample="stages.0.downsample",
    downsample="stages.{s}.downsample",
    block="stages.{s}.blocks.{b}.",
    conv_dw="conv_dw",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    grn=("mlp.grn", "weight", "bias"),
    heads=(
        (*_HEAD, *_FC),
        # `head_hidden_size`.
        (
            *_HEAD,
            *_linear("head.pre_logits.fc", "head.pre_logits", "c{n}", "hidden", "head.pre_logits"),
            *_linear("head.fc", "head.fc", "hidden", "classes", "head.fc"),
        ),
        # `head_norm_first`.
        (*_norm("norm_pre", "norm_pre", "c{n}", "norm_pre"), *_FC),
    ),
)
# timm's `features_only` names the entries of its sequences with an underscore, and has no head.
_FEATURES = replace(
    _TIMM,
    stem="stem_",
    first_downsample="stages_0.downsample",
    downsample="stages_{s}.downsample",
    block="stages_{s}.blocks.{b}.",
    heads=((),),
)
# The backbones of dense prediction have a norm of each stage's map instead of a head.
_MAP_NORMS = _norm("norm{s}", "norms.{s}", "c{s}", "norms")
_ORIGINAL = _Names(
    stem="downsample_layers.0.",
    first_downsample="",
    downsample="downsample_layers.{s}",
    block="stages.{s}.{b}.",
    conv_dw="dwconv",
    fc1="pwconv1",
    fc2="pwconv2",
    grn=("grn", "gamma", "beta"),
    heads=(
        (
            *_norm("norm", "head.norm", "c{n}", "head.norm"),
            *_linear("head", "head.fc", "c{n}", "classes", "head.fc"),
        ),
        _MAP_NORMS,
    ),
)
_MMSEG = replace(
    _ORIGINAL,
    conv_dw="depthwise_conv",
    fc1="pointwise_conv1",
    fc2="pointwise_conv2",
    # A classifier of the same authors has the norm of the last of its four stages alone.
    heads=((*_norm("norm3", "head.norm", "c{n}", "head.norm"), *_FC), _MAP_NORMS),
)


def _overlapped(stem: str, first: int, second: int) -> Rules:
    """A stem of two convolutions at these places of a sequence, and a norm.

    Our names keep the places, for they tell whether there is an activation between.
    """
    return (
        *_patches(f"{stem}{first}", f"stem.conv_{first}", "in", "mid"),
        *_patches(f"{stem}{second}", f"stem.conv_{second}", "mid", "c0"),
        *_norm(f"{stem}{second + 1}", "stem.norm", "c0"),
    )


def _downsample(
    theirs: str, stage: str, before: str, after: str, group: str = "", first_stage: int = 0
) -> Rules:
    own, window = f"stages.{stage}.downsample", f"u{stage} v{stage}"
    return (
        *_norm(f"{theirs}.0", f"{own}.norm", before, group, first_stage),
        *_patches(f"{theirs}.1", f"{own}.conv", before, after, window, group, first_stage),
    )


def _downsamples(names: _Names) -> Rules:
    others = _downsample(names.downsample, "{s}", "c{p}", "c{s}", first_stage=1)
    if not names.first_downsample:
        return others
    # It makes as many channels as it takes, but a shape cannot name a symbol twice.
    first = _downsample(names.first_downsample, "0", "c0", "a0", group="stages.0.downsample")
    return (*first, *others)


def _model(names: _Names) -> tuple[Part, ...]:
    """A whole (WT)ConvNeXt; our names are those of timm."""
    theirs, ours = names.block, _TIMM.block
    conv_dw, ours_dw = f"{theirs}{names.conv_dw}.", f"{ours}conv_dw."
    published, fast, metal = (
        _wtconv(layer, conv_dw, ours_dw, "{s}", "conv_bias")
        for layer in (PUBLISHED_NAMES, FAST_NAMES, METAL_NAMES)
    )
    plain = (
        Rule(f"{conv_dw}weight", "c{s} 1 k{s}*", f"{ours_dw}kernel", "k{s}* 1 c{s}"),
        Rule(f"{conv_dw}bias", "c{s}", f"{ours_dw}bias", "c{s}", "conv_bias"),
    )
    # The second is timm's `conv_mlp`.
    linear, convolved = (
        (
            *_linear(f"{theirs}{names.fc1}", f"{ours}mlp.fc1", "c{s}", "h{s}", window=window),
            *_linear(f"{theirs}{names.fc2}", f"{ours}mlp.fc2", "h{s}", "c{s}", window=window),
        )
        for window in ("", " 1 1")
    )
    # Of channels alone, of maps with the channels last, and of sparse maps.
    grn, *grn_names = names.grn
    grns = tuple(
        _norm(f"{theirs}{grn}", f"{ours}mlp.grn", "h{s}", "grn", 0, grn_names, before)
        for before in ("", "1 1 1 ", "1 ")
    )
    patches = (
        *_patches(f"{names.stem}0", "stem.conv", "in", "c0"),
        *_norm(f"{names.stem}1", "stem.norm", "c0"),
    )
    return (
        (patches, _overlapped(names.stem, 0, 1), _overlapped(names.stem, 0, 2)),
        (_downsamples(names),),
        ((*published, *_filters(conv_dw, "{s}")), plain, fast, metal),
        (_norm(f"{theirs}norm", f"{ours}norm", "c{s}"),),
        (linear, convolved),
        grns,
        ((Rule(f"{theirs}gamma", "c{s}", f"{ours}gamma", "c{s}", "gamma"),),),
        names.heads,
    )


def _conv(theirs: str, ours: str, before: str, after: str, k: str) -> Rules:
    return (
        Rule(
            f"{theirs}.weight", f"{after} {before} {k}", f"{ours}.kernel", f"{k} {before} {after}"
        ),
        Rule(f"{theirs}.bias", after, f"{ours}.bias", after),
    )


@dataclass(frozen=True)
class _Styled:
    """The names that one code gives to a TransformerNet's convolutions and their norms.

    Attributes:
        conv: The convolution inside a layer.
        norm: The norm, of the layer's name and of the one that ours has.
        names: The scale and the bias of the norm.
    """

    conv: str
    norm: str
    names: Sequence[str] = ("weight", "bias")

    def rules(
        self, layer: str, conv: str, norm: str, before: str, after: str, k: str = "k*"
    ) -> Rules:
        """A layer's convolution, which is `conv` here, and the norm that follows it, `norm`."""
        theirs = self.norm.format(layer=layer, norm=norm)
        return (
            *_conv(f"{layer}.{self.conv}", conv, before, after, k),
            *_norm(theirs, norm, after, names=self.names),
            # Averages over the training, which nothing is computed with: PyTorch up to 0.3 saved
            # them, and others do where a norm keeps track.
            Rule(f"{theirs}.running_mean", after, group="running", frozen="anything"),
            Rule(f"{theirs}.running_var", after, group="running", frozen="anything"),
            Rule(f"{theirs}.num_batches_tracked", "", group="tracked", frozen="anything"),
        )

    def ends(self) -> Rules:
        """The stages before the residual blocks and behind them, but the last convolution."""
        return (
            *self.rules("conv1", "conv1", "in1", "in", "c1", "m*"),
            *self.rules("conv2", "conv2", "in2", "c1", "c2"),
            *self.rules("conv3", "conv3", "in3", "c2", "c3"),
            *self.rules("deconv1", "deconv1", "in4", "c3", "c4"),
            *self.rules("deconv2", "deconv2", "in5", "c4", "c5"),
        )

    def blocks(self, names: Sequence[str]) -> Rules:
        """The residual blocks, by the names that the code gives them."""
        return tuple(
            chain.from_iterable(
                (
                    *self._inside(name, f"res{b}", 1, "c3", f"h{b}"),
                    *self._inside(name, f"res{b}", 2, f"h{b}", "c3"),
                )
                for b, name in enumerate(names, 1)
            )
        )

    def _inside(self, theirs: str, ours: str, place: int, before: str, after: str) -> Rules:
        norm = f"{ours}.in{place}"
        return self.rules(f"{theirs}.conv{place}", f"{ours}.conv{place}", norm, before, after)


# PyTorch's example has the norms beside the convolutions, others have both inside of one layer.
_EXAMPLE = _Styled("conv2d", "{norm}")
_LAYERS = _Styled("conv", "{layer}.norm")
_FUSED = replace(_LAYERS, names=("gamma", "beta"))
_BLOCKS = tuple(f"res{b}" for b in range(1, 6))
_IN_SEQUENCE = tuple(f"residual_blocks.{b}" for b in range(5))

_TRANSFORMER_NET = (
    tuple(styled.ends() for styled in (_EXAMPLE, _LAYERS, _FUSED)),
    (
        _EXAMPLE.blocks(_BLOCKS),
        *(
            styled.blocks(names)
            for styled in (_LAYERS, _FUSED)
            for names in (_IN_SEQUENCE, _BLOCKS)
        ),
    ),
    tuple(_conv(f"deconv3.{own}", "deconv3", "c5", "out", "m*") for own in ("conv2d", "1", "conv")),
)

# Where two tables or alternatives fit equally well the first is taken: 2-D before 1-D, published
# before fast.
TABLES: tuple[Table, ...] = (
    *(Table("published", d, (((*_wtconv(PUBLISHED_NAMES), *_filters()),),)) for d in (2, 1, 3)),
    *(Table("fast", d, ((_wtconv(FAST_NAMES),),)) for d in (2, 1, 3)),
    Table("metal", 2, ((_wtconv(METAL_NAMES),),)),
    Table("wtconvnext", 2, _model(_TIMM)),
    Table("original", 2, _model(_ORIGINAL)),
    Table("mmseg", 2, _model(_MMSEG)),
    Table("features_only", 2, _model(_FEATURES)),
    Table("transformer_net", 2, _TRANSFORMER_NET),
)

LAYOUTS: tuple[str, ...] = tuple(dict.fromkeys(table.layout for table in TABLES))
"""Names of the layouts, the layers' first."""


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
