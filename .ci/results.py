"""Writes docs/results.md and its charts from docs/results/*.json: `python .ci/results.py`.

The files are what `flash-wtconv bench … --out`, `python -m torch_bridge bench` and `flash-wtconv
tpu-report --json …` leave. Nothing on the page is typed by hand, nor are tables of other pages that
begin with `<!-- results: NAME -->`, NAME being that of a file, or those of several of one
benchmark; of layers `<!-- passes: NAME -->` begins one with passes over memory and temporaries
beside the times, `<!-- users: NAME -->` one by the users' clock, and
`<!-- implementations: NAME -->` one with a column for each implementation.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import geometric_mean
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
NOISY = 2.0
"""The greatest time over the least from which on times are not compared."""
COLOURS = {"ours": "#0072b2", "others": "#999999"}
"""Two that the colour-blind tell apart, on white and on black."""
OF_THEIR_OWN = "compile", "cycles", "sharding"
"""Benchmarks whose rows fit no table of times."""
Report = dict[str, Any]
Row = dict[str, Any]

HEAD = """# Results

Every figure of this page is from a file in
[docs/results](https://github.com/flash-wtconv/flash-wtconv/tree/main/docs/results), which
`flash-wtconv bench` or `python -m torch_bridge bench` wrote on the device that it names, or
`flash-wtconv tpu-report` without a device; `.ci/results.py` makes tables and charts.
Times are medians in milliseconds, with the least and the greatest of a run. A ratio is the speed
over the baseline, which has 1, in the same run; where the greatest time is over twice the least,
*noisy* stands in its place. A second clock is the users': calls back to back, caches warm, CUDA
graphs on. In charts ours are blue: *flash* alone is what `implementation=None` took, else the
implementation that is named. Whiskers are orange.

Cycles are static figures of a TPU's compiler, no measurement: thousands, forward / backward.
Backward is the gradients of x and of the taps; of `haar` forward is the analysis, backward the
synthesis. *Ours* are the bundles of our kernels, without waiting for memory. *Around* is what XLA's
cost model estimates for the instructions around them, *XLA* for its own program of the same
function, both with traffic; *XLA's bundles* are those of that program, without it. The floor is the
greater of arithmetic and traffic.
"""


def reports(folder: Path) -> dict[str, Report]:
    """The reports of a folder by the names of their files."""
    return {
        path.stem: _as_benchmark(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    }


def _as_benchmark(report: Report) -> Report:
    """A report of `tpu-report` with the fields that those of benchmarks have; others unchanged."""
    if report.get("report") != "tpu":
        return report
    device = {"kind": f"TPU {report['chip']}"}
    clock = "the compiler's static figures"
    return report | {"benchmark": "cycles", "device": device, "clock": clock}


def groups(report: Report) -> dict[tuple[str, str], list[Row]]:
    """The rows of what was computed, in one direction: those that are compared."""
    found: dict[tuple[str, str], list[Row]] = {}
    several = len({row.get("dtype") for row in report["rows"]}) > 1
    for row in report["rows"]:
        if "images_per_s" in row:
            size = report["size"]
            key = f"{report['model']}, batch {report['batch']}, {size} x {size}", row["work"]
        else:
            # `bench levels` is of one array.
            what = row.get("shape") or (f"{row['work']}, {row['name']}" if "work" in row else "x")
            # `bench conv2d` times two expressions of each shape.
            what += f", {row['expression']}" if "expression" in row else ""
            key = f"{what}, {row['dtype']}" if several else what, row["direction"]
        found.setdefault(key, []).append(row)
    return found


def ratio(row: Row) -> str:
    """The speed over the baseline's."""
    if row.get("speedup") is None:
        return ""
    return "noisy" if row["greatest_ms"] > NOISY * row["least_ms"] else f"{row['speedup']:.2f}"


def table(report: Report) -> Iterator[str]:
    """The lines of a report's table."""
    users = any(row.get("users") for row in report["rows"])
    more = " users' ms | ratio |" if users else ""
    yield f"| | direction | by | ms | least – greatest | ratio |{more}"
    yield "|---|---|---|---|---|---|" + "---|---|" * users
    before = None
    for (what, direction), rows in groups(report).items():
        for row in rows:
            first = what if what != before else ""
            times = " – ".join(f"{row[key]:.4g}" for key in ("least_ms", "greatest_ms"))
            cells = [
                first,
                direction,
                row["contender"],
                f"{row['median_ms']:.4g}",
                times,
                ratio(row),
            ]
            if users:
                cells += [f"{row['users']['median_ms']:.4g}", ratio(row["users"])]
            yield f"| {' | '.join(cells)} |"
            before = what


def charted(report: Report) -> bool:
    """Whether there is a chart of a report; several benchmarks have a table alone."""
    return report["benchmark"] not in (*OF_THEIR_OWN, "wtconvnext")


def is_ours(report: Report, contender: str) -> bool:
    """Whether a contender is this package's; in PyTorch all are but the baseline's."""
    if report["benchmark"] == "torch_wtconv":
        return not contender.startswith(report["baseline"])
    return contender.startswith("flash")


def chart(report: Report) -> str:
    """Bars of the ratios as SVG, with whiskers from the greatest to the least time."""
    bars = [
        (f"{what}, {direction}" if i == 0 else "", row)
        for (what, direction), rows in groups(report).items()
        for i, row in enumerate(row for row in rows if ratio(row) not in ("", "noisy"))
    ]
    fastest = max(row["speedup"] * row["median_ms"] / row["least_ms"] for _, row in bars)
    lines, y, scale = [], 10.0, 300 / fastest
    for title, row in bars:
        if title:
            y += 20
            lines.append(f'<text x="10" y="{y - 4:.0f}" font-weight="bold">{escape(title)}</text>')
        colour = COLOURS["ours" if is_ours(report, row["contender"]) else "others"]
        long, least, most = (
            180 + scale * row["speedup"] * row["median_ms"] / row[f"{key}_ms"]
            for key in ("median", "greatest", "least")
        )
        lines += [
            f'<text x="174" y="{y + 11:.0f}" text-anchor="end">{escape(row["contender"])}</text>',
            f'<rect x="180" y="{y:.0f}" width="{long - 180:.1f}" height="13" fill="{colour}"/>',
            f'<path d="M{least:.1f} {y + 6.5:.1f}H{most:.1f}" stroke="#d55e00" stroke-width="2"/>',
            f'<text x="{max(long, most) + 5:.1f}" y="{y + 11:.0f}">{row["speedup"]:.2f}</text>',
        ]
        y += 16
    view = f'viewBox="0 0 540 {y + 10:.0f}" font-family="sans-serif" font-size="11"'
    style = "<style>text{fill:#222}svg{background:#fff}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {view}>{style}'
    return "\n".join([head, *lines, "</svg>", ""])


def section(name: str, report: Report) -> Iterator[str]:
    """The lines of one report."""
    every = (report.get("dtype") or row.get("dtype") for row in report["rows"])
    dtypes = dict.fromkeys(filter(None, every))
    versions = report["versions"]
    # The name of a file is that of the benchmark, of the device, and what tells it from others.
    after = name.removeprefix(report["benchmark"]).split("_")[2:]
    special = " ".join(word for word in after if word not in dtypes)
    words = (
        "PyTorch" if report["benchmark"] == "torch_wtconv" else report["benchmark"].capitalize(),
        special,
        " and ".join(dtypes),
        report["device"]["kind"],
    )
    title = ", ".join(word for word in words if word)
    flags = f" with `XLA_FLAGS={report['xla_flags']}`" if report.get("xla_flags") else ""
    yield f"\n## {title}\n"
    command, version = f"flash-wtconv bench {report['benchmark']}", f"JAX {versions.get('jax')}"
    if report["benchmark"] == "torch_wtconv":
        command, version = "python -m torch_bridge bench", f"PyTorch {versions['torch']}"
    if report["benchmark"] == "cycles":
        kernels = (f"--kernel {row['kernel']}" for row in report["rows"])
        shapes = (f"--shape {row['name']}" for row in report["rows"])
        asked = dict.fromkeys([*kernels, *shapes])
        command = " ".join([f"flash-wtconv tpu-report --chip {report['chip']}", *asked])
        version += f", libtpu {versions['libtpu']}"
    yield (
        f"`{command}`{flags}, {report['date']}, {version}, by {report['clock']}: [{name}.json]"
        f"(https://github.com/flash-wtconv/flash-wtconv/blob/main/docs/results/{name}.json).\n"
    )
    if charted(report):
        yield f"![Bars: speed of {title} over the baseline's](images/results_{name}.svg)\n"
    of_its_own = report["benchmark"] in OF_THEIR_OWN
    yield from TABLES[report["benchmark"]](report) if of_its_own else table(report)
    if report.get("profile"):
        yield "\nWhere the time goes, ms:\n"
        yield from _profile(report)


def figure(value: float) -> str:
    """Two digits, or all of a whole number's."""
    return f"{value:#.2g}".rstrip(".") if value < 99.5 else f"{value:,.0f}"


NAMES = {
    "flash": "ours",
    "plain jax": "plain JAX",
    "depthwise 7x7": "one plain 7×7 depthwise convolution",
    "depthwise 7": "one plain depthwise convolution of 7 taps",
    "torch eager": "PyTorch eager",
}
"""Names of contenders in a table of layers, in its order, by those in reports."""


def _layers(report: Report, passes: bool = False, users: bool = False) -> Iterator[str]:
    """The lines of a table of WTConv layers: forward / forward and backward of each contender.

    With `passes` ours is also told in what its least traffic takes, and with its temporaries; with
    `users` times are those of the users' clock.
    """
    there = {row["contender"] for row in report["rows"]}
    shown = [name for name in NAMES if name in there]
    heads = [NAMES[name] for name in shown]
    if passes:
        heads[1:1] = ["over the passes", f"temporaries, x ({NAMES[report['baseline']]})"]
    yield f"| x | {' | '.join(heads)} |"
    yield "|---" * (1 + len(heads)) + "|"
    layers: dict[tuple[Any, ...], list[Row]] = {}
    for row in report["rows"]:
        layers.setdefault((tuple(row["x"]), row["levels"], row["dtype"]), []).append(row)
    several = len({dtype for _, _, dtype in layers}) > 1
    for (x, levels, dtype), rows in layers.items():
        # Of signals another plain convolution is timed than of images.
        here = {row["contender"] for row in rows}
        timed = [row | row["users"] for row in rows] if users else rows
        cells = [" / ".join(_times(timed, name)) if name in here else "" for name in shown]
        if passes:
            cells[1:1] = _memory(rows, shown[0], report["baseline"])
        title = f"{x}, {levels} levels" + f", {dtype}" * several
        yield f"| {title} | {' | '.join(cells)} |"


def _memory(rows: list[Row], ours: str, baseline: str) -> list[str]:
    """Passes over memory, both ways, and temporaries of forward and backward beside another's."""
    by = {(row["contender"], row["direction"]): row for row in rows}
    over = (f"{by[ours, one]['over_floor']:.1f}×" for one in ("forward", "forward+backward"))
    memory, other = (by[one, "forward+backward"]["temporaries"] for one in (ours, baseline))
    return [" / ".join(over), f"{memory:.1f} ({other:.1f})"]


def _times(rows: list[Row], contender: str) -> list[str]:
    """Milliseconds of a contender, forward, and forward and backward."""
    times = {row["direction"]: row["median_ms"] for row in rows if row["contender"] == contender}
    return [figure(times[one]) for one in ("forward", "forward+backward")]


LAST = " channels-last"
"""The end of the names of PyTorch's contenders whose images have channels last."""
BOTH = ("forward", "forward+backward")
Lines = dict[tuple[Any, ...], dict[tuple[Any, ...], Row]]


def _lines(report: Report, line: Sequence[str], cell: Sequence[str]) -> Lines:
    """The rows by what a line of a table is of, and there by what a cell is of."""

    def key(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
        values = (row[name] for name in names)
        return tuple(tuple(one) if isinstance(one, list) else one for one in values)

    found: Lines = {}
    for row in report["rows"]:
        found.setdefault(key(row, line), {})[key(row, cell)] = row
    return found


def _named(report: Report) -> list[str]:
    """Our contenders that name an implementation; if there is none, what was taken unasked."""
    names = dict.fromkeys(row["contender"] for row in report["rows"])
    ours = [name for name in names if is_ours(report, name)]
    return [name for name in ours if name != "flash"] or ours


def _heading(contender: str) -> str:
    """The head of a contender's column."""
    if contender == "flash":
        return "ours"
    ours = contender.startswith("flash ")
    return f"`{contender[6:]}`" if ours else contender.replace("jax", "JAX")


def _torch(report: Report) -> Iterator[str]:
    """The lines of a table of PyTorch's layers: forward / forward and backward of each.

    One implementation is told of contiguous images, every one of those with channels last.
    """
    baseline = report["baseline"]
    ours = _named(report) or [baseline]
    first = "cuda" if "cuda" in ours else ours[0]
    last = [name.removesuffix(LAST) for name in ours if name.endswith(LAST)]
    heads = [f"`{first}`, ms", "over the passes", f"faster than {baseline}", "memory in inputs"]
    heads += [f"`{name}`{LAST}, ms" for name in last]
    yield f"| x | {' | '.join(heads)} |"
    yield "|---" * (1 + len(heads)) + "|"
    lines = _lines(report, ("x", "levels", "dtype"), ("contender", "direction"))
    several = len({dtype for _, _, dtype in lines}) > 1
    for ((n, h, w, c), levels, dtype), by in lines.items():
        title = f"{n, c, h, w}, {levels} levels" + f", {dtype}" * several
        ways = [by[first, direction] for direction in BOTH]
        memory = ways[-1]["extra_memory"]
        cells = [
            _milliseconds(by, first),
            " / ".join(f"{figure(row['over_floor'])}×" for row in ways),
            " / ".join(_over(row, figure) for row in ways),
            "" if memory is None else f"{memory:.1f}",
            *(_milliseconds(by, f"{name}{LAST}") for name in last),
        ]
        yield f"| {title} | {' | '.join(cells)} |"


def _milliseconds(by: dict[tuple[Any, ...], Row], contender: str) -> str:
    """Three digits of a contender's times, forward / forward and backward; "" of none."""
    rows = [by[contender, one] for one in BOTH if (contender, one) in by]
    return " / ".join(f"{row['median_ms']:#.3g}".rstrip(".") for row in rows)


def _haar(report: Report) -> Iterator[str]:
    """The lines of a table of Haar cascades: analysis / synthesis of each, in copies of x."""
    dtypes = dict.fromkeys(row["dtype"] for row in report["rows"])
    columns = [(dtype, name) for dtype in dtypes for name in _named(report)]
    yield f"| x | {' | '.join(f'{_heading(name)}, {dtype}' for dtype, name in columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    lines = _lines(report, ("x", "levels"), ("dtype", "contender", "direction"))
    for (x, levels), by in lines.items():
        ways = [[by.get((*one, way)) for way in ("analysis", "synthesis")] for one in columns]
        cells = (" / ".join(f"{row['copies']:.2f}" for row in both if row) for both in ways)
        yield f"| {x}, {levels} levels | {' | '.join(cells)} |"


def _conv2d(report: Report) -> Iterator[str]:
    """The lines of a table of dense convolutions: times of two, and speeds over XLA's."""
    baseline, named = report["baseline"], _named(report)
    first = "flash mosaic_gpu" if "flash mosaic_gpu" in named else named[0]
    plain, *fused = dict.fromkeys(row["expression"] for row in report["rows"])
    columns = [(first, expression, way) for expression in (plain, *fused) for way in BOTH]
    # Ours in plain JAX is what it is compared with.
    columns += [(n, plain, BOTH[0]) for n in named if n not in (first, "flash xla")]
    heads = [f"{one}, ms and TFLOP/s" for one in (_heading(first), "XLA")]
    for name, expression, way in columns:
        by = "" if name == first else f"{_heading(name)}, "
        what = "" if expression == plain else f"with {', '.join(expression.split('+'))}, "
        heads.append(f"{by}{what}{way}")
    yield f"| x, filters | {' | '.join(heads)} |"
    yield "|---" * (1 + len(heads)) + "|"
    lines = _lines(report, ("x", "w", "dtype"), ("contender", "expression", "direction"))
    several = len({dtype for _, _, dtype in lines}) > 1
    for (x, (height, width, _, features), dtype), by in lines.items():
        rates = (by.get((one, plain, BOTH[0])) for one in (first, baseline))
        cells = [
            f"{row['median_ms']:.3f}, {figure(row['tflops_per_s'])}" if row else "" for row in rates
        ]
        cells += [_over(by.get(column)) for column in columns]
        title = f"{x}, {height} × {width} × {features}" + f", {dtype}" * several
        yield f"| {title} | {' | '.join(cells)} |"
    means = (_mean([by[column] for by in lines.values() if column in by]) for column in columns)
    yield f"| geometric mean | | | {' | '.join(means)} |"


def _mean(rows: list[Row]) -> str:
    """The geometric mean of speeds over the baseline."""
    if any(ratio(row) == "noisy" for row in rows):
        return "noisy"
    return f"{geometric_mean(row['speedup'] for row in rows):.2f}×"


def _levels(report: Report) -> Iterator[str]:
    """The lines of a table of levels: what each adds and costs."""
    yield "| levels | field, pixels | parameters | forward, ms | forward and backward, ms |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys(row["contender"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["contender"] == name]
        first, times = rows[0], " | ".join(_times(rows, name))
        levels = first["levels"]
        title = "one plain 7×7 depthwise convolution" if levels is None else levels
        yield f"| {title} | {first['field']} | {first['parameters']:,} | {times} |"


def _compile(report: Report) -> Iterator[str]:
    """The lines of a table of first calls: seconds of all, and of XLA's part of ours."""
    yield "| | ours, s | of which XLA, s | plain JAX, s | over plain JAX |"
    yield "|---|---|---|---|---|"
    by = {(row["program"], row["contender"]): row for row in report["rows"]}
    for program in dict.fromkeys(program for program, _ in by):
        ours, plain = (by[program, contender] for contender in ("flash", "plain jax"))
        cells = [f"{ours[part]:.1f}" for part in ("all", "compile")]
        cells += [f"{plain['all']:.1f}", f"{ours['speedup']:.1f}×"]
        yield f"| {program} | {' | '.join(cells)} |"


def _sparse(report: Report) -> Iterator[str]:
    """The lines of a table of sparse convolutions: ours, and its speed over other forms."""
    every = ("gather, dot, scatter-add", "im2col", "spconv-triton")
    there = {row["contender"] for row in report["rows"]}
    others = [one for one in every if one in there]
    heads = ["ms", "TFLOP/s", "times forward", "temporaries, x", *(f"over {one}" for one in others)]
    yield f"| | | {' | '.join(heads)} |"
    yield "|---" * (2 + len(heads)) + "|"
    before = None
    for (shape, direction), rows in groups(report).items():
        by = {row["contender"]: row for row in rows}
        title = _sparse_title(shape) if shape != before else ""
        before = shape
        if direction == "map":
            for voxels, row in by.items():
                cells = [f"{row['median_ms']:.3f}", *[""] * (len(heads) - 1)]
                yield f"| {title} | map, {voxels} voxels | {' | '.join(cells)} |"
                title = ""
            continue
        ours = by["flash"]
        cells = [f"{ours['median_ms']:.3f}", figure(ours["tflops_per_s"])]
        cells += [f"{ours['over_forward']:.1f}", f"{ours['temporaries']:.2f}"]
        times = [by[one]["median_ms"] if one in by else None for one in others]
        cells += [f"{one / ours['median_ms']:.3g}×" if one else "" for one in times]
        yield f"| {title} | {direction} | {' | '.join(cells)} |"


def _sparse_title(shape: str) -> str:
    """A layer's channels and features by its name, and what it has beside a million voxels."""
    match = re.fullmatch(r"(?:depthwise_)?room_(\d+)_(\d+)(?:_(\d+)_s(\d))?", shape)
    assert match, shape
    voxels, channels, features, stride = match.groups()
    words = [f"{channels} → {features}" if features else f"depthwise, {channels}"]
    if stride not in (None, "1"):
        words.append(f"stride {stride}")
    if voxels != "1000000":
        words.append(f"{int(voxels):,} voxels")
    return ", ".join(words)


def _by_implementation(report: Report) -> Iterator[str]:
    """The lines of a table of what implementations take: times, and speeds over plain JAX.

    What was taken unasked is left out: such reports are made to decide that.
    """
    names = dict.fromkeys(row["contender"] for row in report["rows"])
    shown = [name for name in names if name != "flash"]
    yield f"| | | {' | '.join(map(_heading, shown))} |"
    yield "|---" * (2 + len(shown)) + "|"
    before = None
    for (what, direction), rows in groups(report).items():
        by = {row["contender"]: row for row in rows}
        cells = [_time_and_speed(by.get(name)) for name in shown]
        title = what.removeprefix("layer, ") if what != before else ""
        yield f"| {title} | {direction} | {' | '.join(cells)} |"
        before = what


def _time_and_speed(row: Row | None) -> str:
    """A cell: nothing of what was not timed, and of the baseline its time alone."""
    if row is None:
        return ""
    time, speed = f"{row['median_ms']:.3f} ms", _over(row)
    if not speed or row["contender"] == row.get("baseline", "plain jax"):
        return time
    return f"{time}, {speed}"


def _over(row: Row | None, told: Callable[[float], str] = "{:.2f}".format) -> str:
    """The speed over the baseline in a cell: nothing of what was not timed."""
    speed = "" if row is None else ratio(row)
    return speed if row is None or speed in ("", "noisy") else f"{told(row['speedup'])}×"


def _networks(report: Report) -> Iterator[str]:
    """The lines of a table of networks: images a second as users have them, and a batch's time."""
    if report["profile"]:
        yield from _profile(report)
        return
    shown = dict.fromkeys(row["contender"] for row in report["rows"])
    yield f"| images a second | {' | '.join(shown)} |"
    yield "|---" * (1 + len(shown)) + "|"
    for (_, work), rows in groups(report).items():
        users = {row["contender"]: row["users"] for row in rows}
        cells = (
            f"{users[name]['images_per_s']:,.0f} ({users[name]['median_ms']:.2f} ms)"
            for name in shown
        )
        yield f"| {work} | {' | '.join(cells)} |"


def _profile(report: Report) -> Iterator[str]:
    """The lines of a table of where a network's time goes, a line a part."""
    times: dict[str, dict[tuple[str, ...], float]] = {}
    for row in report["profile"]:
        column = row["contender"], row["work"], row["direction"]
        times.setdefault(row["part"], {})[column] = row["ms"]
    columns = dict.fromkeys(column for part in times.values() for column in part)
    yield f"| ms a batch | {' | '.join(', '.join(column) for column in columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for part, found in times.items():
        cells = (f"{found[one]:.2f}" if one in found else "" for one in columns)
        yield f"| {part} | {' | '.join(cells)} |"
    sums = (sum(part.get(one, 0) for part in times.values()) for one in columns)
    yield f"| all | {' | '.join(f'{one:.2f}' for one in sums)} |"


_STEPS = {
    "torch eager": "PyTorch eager",
    "torch compiled": "PyTorch compiled",
    "torch compiled channels-last": "PyTorch compiled, channels-last",
    "plain jax": "plain JAX",
    "norm alone": "our norm alone",
    "convolution+norm": "our convolution and norm, one by one",
    "flash": "what is taken unasked",
}
"""Titles of the steps from another network of style transfer to ours, by contenders' names."""


def _stylize(report: Report) -> Iterator[str]:
    """The lines of a table of a network of style transfer, its layers or its norms."""
    special = {"ladder": _ladder, "layer": _by_implementation, "norm": _norms}
    work = report["rows"][0]["work"]
    if work in special:
        yield from special[work](report)
        return
    if len({(row["work"], row["name"], row["dtype"]) for row in report["rows"]}) > 1:
        yield from _stylize_networks(report)
        return
    yield "| | ms | over plain JAX | temporaries, MB |"
    yield "|---|---|---|---|"
    for row in report["rows"]:
        by = row["contender"].removeprefix("flash ")
        title = _STEPS.get(row["contender"], f"`conv2d_instance_norm` by `{by}`")
        megabytes = f"{row['temporaries'] / 1e6:.0f}"
        yield f"| {title} | {row['median_ms']:.2f} | {row['speedup']:.2f}× | {megabytes} |"


def _norms(report: Report) -> Iterator[str]:
    """The lines of a table of norms: what a copy takes, and the others in such copies."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in report["rows"]:
        key = row["name"], row["dtype"], row["direction"]
        found.setdefault(key, {})[row["contender"]] = row
    names = dict.fromkeys(row["contender"] for row in report["rows"])
    shown = [name for name in names if name not in ("copy", "flash")]
    heads = " | ".join(map(_heading, shown))
    yield f"| | | a copy, ms | ours unasked, copies | {heads} |"
    yield "|---" * (4 + len(shown)) + "|"
    for (name, dtype, direction), by in found.items():
        cells = " | ".join(f"{by[one]['over_copy']:.2f}" for one in ("flash", *shown))
        yield f"| {name}, {dtype} | {direction} | {by['copy']['median_ms']:.4f} | {cells} |"


def _depthwise(report: Report) -> Iterator[str]:
    """The lines of a table of depthwise convolutions, in copies of x, and beside plain JAX."""
    yield "| x | kernel | | a copy, ms | ours, copies | plain JAX | ours over plain JAX |"
    yield "|---" * 7 + "|"
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in report["rows"]:
        stride = f", stride {row['stride']}" if row["stride"] > 1 else ""
        kernel = f"{row['kernel_size']}×{row['kernel_size']}{stride}"
        key = str(tuple(row["x"])), kernel, row["direction"]
        found.setdefault(key, {})[row["contender"]] = row
    for key, by in found.items():
        copies = " | ".join(f"{by[one]['copies']:.2f}" for one in ("flash", "plain jax"))
        times = f"{by['copy']['median_ms']:.4f} | {copies} | {by['flash']['speedup']:.2f}×"
        yield f"| {' | '.join(key)} | {times} |"


def _ladder(report: Report) -> Iterator[str]:
    """The lines of a table of one network step by step, from PyTorch's in float32 on."""
    yield "| | ms | over PyTorch eager |"
    yield "|---|---|---|"
    for row in report["rows"]:
        name, _, dtype = row["contender"].rpartition(" ")
        times = f"{row['median_ms']:.2f} | {row['speedup']:.2f}×"
        yield f"| {_STEPS[name]}, {dtype} | {times} |"


def _stylize_networks(report: Report) -> Iterator[str]:
    """The lines of a table of several networks and training steps: others', and ours unasked."""
    others = {
        "plain jax": "plain JAX",
        "torch eager": "PyTorch",
        "torch compiled": "compiled",
        "torch compiled channels-last": "channels-last",
    }
    there = {row["contender"] for row in report["rows"]}
    shown = [name for name in others if name in there]
    heads = [f"{others[name]}, ms" for name in shown]
    yield f"| | {' | '.join(heads)} | ours, ms | over plain JAX | temporaries, MB (plain JAX) |"
    yield "|---" * (4 + len(shown)) + "|"
    found: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        step = ", training step" if row["direction"] == "step" else ""
        title = f"{row['name']}, {row['dtype']}{step}"
        found.setdefault(title, {})[row["contender"]] = row
    for title, by in found.items():
        plain, ours = by["plain jax"], by["flash"]
        memory, other = (f"{row['temporaries'] / 1e6:,.0f}" for row in (ours, plain))
        # A network may not fit beside another's.
        medians = (by.get(name, {}).get("median_ms") for name in (*shown, "flash"))
        times = " | ".join("" if ms is None else f"{ms:.2f}" for ms in medians)
        yield f"| {title} | {times} | {ours['speedup']:.2f}× | {memory} ({other}) |"


AXES = {"n": "batch", "c": "channels", "f": "features", "h": "rows", "s": "scenes"}


def _sharding(report: Report) -> Iterator[str]:
    """The lines of tables of several devices: operators beside one device's, and times."""
    operators = [row for row in report["rows"] if row["part"] == "operators"]
    timed = [row for row in report["rows"] if row["part"] != "operators"]
    if operators:
        yield from _split_operators(operators)
    if operators and timed:
        yield ""
    if timed:
        yield "| | devices | ms | images a second | of linear | exchanged |"
        yield "|---|---|---|---|---|---|"
    before = None
    for row in timed:
        title = f"rows of {tuple(row['shape'])}" if "shape" in row else "training"
        count = row["devices"]
        cells = [
            title if title != before else "",
            f"{count}, {row['kind']} axes" if count > 1 else "1",
            f"{row['median_ms']:.2f}",
            f"{row['images_per_s']:,.0f}" if "images_per_s" in row else "",
            f"{row['efficiency']:.3f}" if count > 1 and "efficiency" in row else "",
            _exchanged([row]),
        ]
        yield f"| {' | '.join(cells)} |"
        before = title


def _split_operators(rows: list[Row]) -> Iterator[str]:
    """The lines of a table of operators: a line an axis, the worst of the ways in."""
    yield "| operator | split | output off | gradients off | exchanged |"
    yield "|---|---|---|---|---|"
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["operator"], row["split"]), []).append(row)
    before = None
    for (operator, split), found in cases.items():
        worst = [f"{max(errors):.0e}" for errors in zip(*(r["errors"] for r in found), strict=True)]
        if all(row["bitwise"] for row in found):
            worst[0] = "bitwise alike"
        wrong = dict.fromkeys(row["wrong"] for row in found if row["wrong"])
        name = operator if operator != before else ""
        exchanged = "; ".join([_exchanged(found), *wrong])
        yield f"| {' | '.join([name, AXES[split], *worst, exchanged])} |"
        before = operator


def _exchanged(rows: list[Row]) -> str:
    """The collectives of programs, of each kind the most, with the elements of their results."""
    most: dict[str, list[int]] = {}
    for row in rows:
        for kind, numbers in row["collectives"].items():
            most[kind] = max(most.get(kind, [0, 0]), numbers)
    return ", ".join(f"{n} {kind} ({size:,})" for kind, (n, size) in most.items()) or "nothing"


def _cycles(report: Report) -> Iterator[str]:
    """The lines of a table of static cycles: a line a kernel, shape and dtype."""
    several = len({row["kernel"] for row in report["rows"]}) > 1
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in report["rows"]:
        title = f"{row['kernel']}, " * several + _cycles_title(row)
        found.setdefault((title, row["dtype"]), {})[row["direction"]] = row
    yield "| x | | ours | around | XLA | XLA's bundles | floor |"
    yield "|---" * 7 + "|"
    before = None
    for (title, dtype), by in found.items():
        cells = [
            _thousands(by[direction][f"{which}cycles"] for direction in ("forward", "backward"))
            for which in ("", "around_", "xla_", "xla_bundle_", "floor_")
        ]
        yield f"| {' | '.join([title if title != before else '', dtype, *cells])} |"
        before = title


def _cycles_title(row: Row) -> str:
    """An array with the levels of its layer, or the taps of a convolution that has none."""
    k = row["kernel_size"]
    return f"{tuple(row['x'])}, " + (f"{row['levels']} levels" if row["levels"] else f"{k}×{k}")


def _thousands(numbers: Iterable[int | None]) -> str:
    """A cell: thousands, of what is known."""
    return " / ".join("not known" if one is None else f"{one / 1e3:,.0f}" for one in numbers)


TABLES: dict[str, Callable[[Report], Iterator[str]]] = {
    "compile": _compile,
    "conv2d": _conv2d,
    "cycles": _cycles,
    "depthwise": _depthwise,
    "haar": _haar,
    "levels": _levels,
    "mlp": _by_implementation,
    "sharding": _sharding,
    "sparse": _sparse,
    "stylize": _stylize,
    "torch_wtconv": _torch,
    "wtconv": _layers,
    "wtconvnext": _networks,
}
"""The makers of a page's table of a report, or of several as one, by the benchmark."""
PAGES = (
    "README.md",
    "docs/depthwise.md",
    "docs/index.md",
    "docs/operators/wtconv.md",
    "docs/performance.md",
    "docs/sharding.md",
)
_KINDS = "results|passes|users|implementations"
_TABLE = re.compile(rf"<!-- ({_KINDS}): ([\w ]+?) -->\n.*?(?=<!-- end -->)", re.S)


def filled(text: str, found: dict[str, Report]) -> str:
    """A page with the tables that its reports make.

    Raises:
        KeyError: A table names a report that is not there.
    """

    def table_of(match: re.Match[str]) -> str:
        kind, names = match.groups()
        every = [found[name] for name in names.split()]
        assert len({(one["benchmark"], str(one["device"])) for one in every}) == 1, names
        rows = [{"dtype": one.get("dtype")} | row for one in every for row in one["rows"]]
        report = every[0] | {"rows": rows}
        own = {
            "implementations": _by_implementation,
            "passes": partial(_layers, passes=True),
            "users": partial(_layers, users=True),
        }
        maker = own.get(kind, TABLES[report["benchmark"]])
        return "\n".join([f"<!-- {kind}: {names} -->\n", *maker(report), "", ""])

    return _TABLE.sub(table_of, text)


def files(docs: Path) -> dict[Path, str]:
    """Returns what is made of reports in `docs/results`: a page, tables of others, and charts."""
    found = reports(docs / "results")
    lines = [line for name, report in found.items() for line in section(name, report)]
    made = {docs / "results.md": "\n".join([HEAD, *lines, ""]).replace("\n\n\n", "\n\n")}
    for name, report in found.items():
        if charted(report):
            made[docs / "images" / f"results_{name}.svg"] = chart(report)
    for path in filter(Path.exists, (docs.parent / name for name in PAGES)):
        made[path] = filled(path.read_text(encoding="utf-8"), found)
    return made


if __name__ == "__main__":
    for path, text in files(DOCS).items():
        path.write_text(text, encoding="utf-8")
