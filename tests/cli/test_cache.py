"""`flash-wtconv cache`: show, clear, export, import, path."""

import pytest
from typer.testing import CliRunner

from flash_wtconv_jax import cli
from pallas_kernels.common import versions
from pallas_kernels.dispatch import cache

runner = CliRunner()

KIND = "Abacus 3000"
ENTRY = {
    "operator": "wtconv",
    "direction": "fwd",
    "problem": {"shape": [2, 8, 8, 4], "dtype": "float32"},
    "static": {},
    "versions": {"jax": "0.11.2"},
    "date": "2026-11-21T12:00:00+00:00",
    "measured": [
        {"implementation": "fast", "config": {"block": 8}, "ms": 0.5},
        {"implementation": "slow", "config": {}, "ms": 1.0},
        {"implementation": "none", "config": {}, "failed": "out of memory"},
    ],
}
FAILED = {**ENTRY, "direction": "bwd", "measured": ENTRY["measured"][2:]}


@pytest.fixture
def store(monkeypatch, tmp_path):
    store = cache.Cache(tmp_path / "measured")
    monkeypatch.setattr(cache, "user_cache", lambda: store)
    return store


def run(*arguments):
    return runner.invoke(cli.app, ["cache", *map(str, arguments)], env={"COLUMNS": "160"})


def test_show_and_path(store):
    store.put(KIND, [ENTRY, FAILED])
    shown = run("show").output
    for word in (KIND, "wtconv fwd", "[2, 8, 8, 4]", "fast block=8", "0.5", "slow x2.00"):
        assert word in shown
    assert "wtconv bwd" in shown and "out of memory" in shown
    assert run("path").output.replace("\n", "") == str(store.folder)


def test_names_are_no_markup(store):
    failed = {**FAILED, "measured": [{"implementation": "a", "config": {}, "failed": "no [/b]"}]}
    store.put("GPU [/a]", [failed, {**ENTRY, "operator": "o[/c]"}])
    shown = run("show").output
    for word in ("GPU [/a]", "no [/b]", "o[/c] fwd"):
        assert word in shown


def test_export_clear_and_import(store, tmp_path):
    store.put(KIND, [ENTRY])
    store.put("other", [FAILED])
    out, one = tmp_path / "all.json", tmp_path / "one.json"
    assert "wrote 2 entries" in run("export", out).output
    assert "wrote 1 entries" in run("export", one, "--device", KIND).output
    assert "forgot 1 entries" in run("clear", "--device", "other").output
    assert store.kinds() == [KIND]
    assert "forgot 1 entries" in run("clear").output
    assert store.kinds() == []
    assert "read 2 entries of Abacus 3000, other" in run("import", out).output
    assert cache.Cache(store.folder).entries(KIND) == [ENTRY]
    assert cache.Cache(store.folder).entries("other") == [FAILED]


def test_import_says_what_it_kept_and_what_counts_here(store, tmp_path, monkeypatch):
    out = tmp_path / "all.json"
    mine = {**ENTRY, "versions": {"flash-wtconv": versions.package()}}
    out.write_text(cache.dumped({KIND: [ENTRY, mine]}))
    told = run("import", out).output
    assert f"kept them in {store.folder}" in told.replace("\n", "")
    assert f"of these, 1 of other versions than {versions.package()} do not count here" in told
    out.write_text(cache.dumped({KIND: [mine]}))
    assert "other versions" not in run("import", out).output
    # A file stands where the folder would be.
    monkeypatch.setattr(cache, "user_cache", lambda: cache.Cache(out / "measured"))
    failed = run("import", out)
    assert failed.exit_code == 1 and isinstance(failed.exception, OSError)
    assert "read" not in failed.output


def test_what_is_wrong_is_said(store, tmp_path):
    def error(*arguments):
        result = run(*arguments)
        assert result.exit_code == 1
        return str(result.exception)

    out = tmp_path / "out.json"
    empty = run("show")
    assert empty.exit_code == 0 and "nothing was measured yet" in empty.output
    assert "nothing was measured yet" in error("export", out)
    store.put(KIND, [ENTRY])
    assert "--device 'H200': nothing was measured on it, but on ['Abacus 3000']" in error(
        "show", "--device", "H200"
    )
    out.write_text("{}")
    assert "exists already" in error("export", out)
    assert run("export", out, "--force").exit_code == 0
    out.write_text("{}")
    assert "out.json holds no exported measurements: it has no 'format'" in error("import", out)
    assert "No such file" in error("import", tmp_path / "missing.json")
