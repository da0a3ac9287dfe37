"""Measurements in files that processes share, and in files that are damaged or missing."""

import json
import subprocess
import sys
import threading

import pytest

from pallas_kernels.dispatch import cache
from pallas_kernels.dispatch.cache import Cache

pytestmark = pytest.mark.core

KIND = "Abacus 3000 (PCIe)"
FILE = "abacus_3000_pcie.json"
USER_CACHE = cache.user_cache
"""Before the suite's fixture replaces it."""


def entry(n, **ms):
    return {
        "operator": "fake",
        "direction": "fwd",
        "problem": {"n": n},
        "static": {},
        "versions": {},
        "date": "2026-11-21",
        "measured": [{"implementation": i, "config": {}, "ms": t} for i, t in ms.items()],
    }


def numbers(folder):
    return sorted(one["problem"]["n"] for one in Cache(folder).entries(KIND))


def test_another_process_reads_what_was_put(tmp_path):
    folder = tmp_path / "made" / "here"
    first, new = Cache(folder), entry(1, fast=1.0)
    assert first.get(KIND, cache.key(new)) is None
    first.put(KIND, [new])
    assert first.get(KIND, cache.key(new)) == new
    first.flush()
    assert Cache(folder).get(KIND, cache.key(new)) == new
    assert Cache(folder).get("another kind", cache.key(new)) is None
    # For people: an entry a line.
    lines = (folder / FILE).read_text().splitlines()
    assert sum('"operator": "fake"' in line for line in lines) == 1
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [FILE]


def test_entries_of_a_key_are_merged_with_what_others_wrote(tmp_path):
    one, two = Cache(tmp_path), Cache(tmp_path)
    assert one.entries(KIND) == two.entries(KIND) == []
    one.put(KIND, [entry(1, fast=1.0, slow=3.0)])
    one.flush()
    two.put(KIND, [entry(1, slow=0.5), entry(2, slow=1.0)])
    two.flush()
    for found in (two.entries(KIND), Cache(tmp_path).entries(KIND)):
        assert [e["problem"]["n"] for e in found] == [1, 2]
        times = [(m["implementation"], m["ms"]) for m in found[0]["measured"]]
        assert times == [("slow", 0.5), ("fast", 1.0)]


def test_what_is_not_to_be_written_is_remembered(tmp_path):
    store = Cache(tmp_path)
    store.put(KIND, [entry(1, a=1.0)], write=False)
    store.put(KIND, [entry(2, a=1.0)])
    store.flush()
    assert [one["problem"]["n"] for one in store.entries(KIND)] == [1, 2]
    assert numbers(tmp_path) == [2]


def test_clear_and_kinds(tmp_path):
    store = Cache(tmp_path)
    store.put(KIND, [entry(1, a=1.0), entry(2, a=1.0)])
    store.put("other", [entry(1, a=1.0)])
    assert store.kinds() == sorted([KIND, "other"])
    store.flush()
    assert Cache(tmp_path).kinds() == sorted([KIND, "other"])
    assert store.clear("other") == 1 and store.clear() == 2
    assert store.kinds() == Cache(tmp_path).kinds() == []
    assert not list(tmp_path.glob("*.json"))


PROCESSES = """
import os, random, signal, sys, time
from pathlib import Path
from pallas_kernels.dispatch.cache import Cache
KIND, folder = sys.argv[1], Path(sys.argv[2])


def entry(n):
    measured = [{"implementation": "a", "config": {}, "ms": 1.0}]
    return {"operator": "fake", "direction": "fwd", "problem": {"n": n}, "static": {},
            "versions": {}, "date": "", "measured": measured}


def child(run):
    pid = os.fork()
    if pid == 0:
        run()
        os._exit(0)
    return pid
"""

AT_ONCE = """
def write(first):
    store = Cache(folder)
    for n in range(first, first + 10):
        store.put(KIND, [entry(n)])
        if n % 3 == 0:
            store.flush()
    store.flush()


for pid in [child(lambda p=p: write(100 * p)) for p in range(8)]:
    os.waitpid(pid, 0)
"""

KILLED = """
random.seed(0)


def write(first, pipe):
    store = Cache(folder)
    for n in range(first, first + 10**6):
        store.put(KIND, [entry(n)])
        store.flush()
        os.write(pipe, b"%d\\n" % n)


finished = []
for first in range(50):
    read, pipe = os.pipe()
    pid = child(lambda: write(10**6 * first, pipe))
    os.close(pipe)
    finished.append(os.read(read, 10**5))
    time.sleep(0.02 * random.random())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(read, 10**5):
        finished.append(more)
    os.close(read)
print(b"".join(finished).decode())
"""


def processes(code, folder):
    """Runs code that forks, in a process that has no threads."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROCESSES + code, KIND, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return [int(n) for n in result.stdout.split()]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_eight_processes_write_at_once(tmp_path):
    processes(AT_ONCE, tmp_path)
    assert numbers(tmp_path) == sorted(100 * p + n for p in range(8) for n in range(10))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_killed_process_loses_nothing_that_was_finished(tmp_path):
    finished = processes(KILLED, tmp_path)
    assert len({n // 10**6 for n in finished}) == 50
    assert set(finished) <= set(numbers(tmp_path))
    # And one more may write, whatever the killed ones held.
    store = Cache(tmp_path)
    store.put(KIND, [entry(-1, a=1.0)])
    store.flush()
    assert numbers(tmp_path)[0] == -1


def test_the_interpreter_waits_for_the_writer(tmp_path):
    code = PROCESSES + "Cache(folder).put(KIND, [entry(n) for n in range(200)])\n"
    subprocess.run([sys.executable, "-c", code, KIND, str(tmp_path)], check=True, timeout=60)
    assert numbers(tmp_path) == list(range(200))


GOOD = cache.dumped({KIND: [entry(1, a=1.0)]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD[: len(GOOD) // 2], "Unterminated"),
        ("", "Expecting value"),
        ("[1, 2]", "no 'format'"),
        ('{"entries": []}', "no 'format'"),
        (GOOD.replace('"version": 1', '"version": 0'), "version 0, expected 1"),
        (GOOD.replace('"operator"', '"op"'), "an entry is not one of ours"),
        (GOOD.replace('"ms"', '"us"'), "neither 'ms' nor 'failed'"),
        (GOOD.replace('"ms": 1.0', '"ms": "fast"'), "'ms' of 'fast', expected a positive number"),
        *(
            (GOOD.replace('"ms": 1.0', f'"ms": {ms}'), "a candidate has 'ms' of")
            for ms in ("null", "[1.0]", "true", "NaN", "Infinity", "0", "-1", "1" + "0" * 400)
        ),
        (GOOD.replace('"config": {}', '"config": []'), "a candidate is not one of ours: .*config"),
        (GOOD.replace('"ms": 1.0', '"failed": null'), "a candidate is not one of ours: .*failed"),
        (GOOD.replace('"fwd"', '["fwd"]'), "an entry is not one of ours: .*direction"),
        (GOOD.replace('"n": 1', '"n": ' + "[" * 10**5 + "]" * 10**5), "nested too deeply"),
        ("\xff\x00", "codec"),
    ],
)
def test_a_file_that_cannot_be_read_is_set_aside(tmp_path, text, reason):
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    store = Cache(tmp_path)
    with pytest.warns(RuntimeWarning, match=f"{reason}.*is now abacus") as told:
        assert store.entries(KIND) == []
    assert len(told) == 1
    assert (tmp_path / FILE).with_suffix(".unreadable").read_bytes() == text.encode("latin-1")
    store.put(KIND, [entry(2, a=1.0)])
    store.flush()
    assert numbers(tmp_path) == [2]


def test_a_file_that_breaks_meanwhile_is_set_aside_by_the_writer(tmp_path):
    store = Cache(tmp_path)
    assert store.entries(KIND) == []
    (tmp_path / FILE).write_text("{")
    with pytest.warns(RuntimeWarning, match="is now abacus"):
        store.put(KIND, [entry(2, a=1.0)])
        store.flush()
    assert numbers(tmp_path) == [2]


def test_a_folder_that_cannot_be_written_means_memory_alone(tmp_path):
    # A file where the folder would be: that stops root too.
    (tmp_path / "file").write_text("")
    store = Cache(tmp_path / "file" / "measured")
    with pytest.warns(RuntimeWarning, match="kept in memory alone, .* cannot be written") as told:
        for n in range(3):
            store.put(KIND, [entry(n, a=1.0)])
            store.flush()
    assert len(told) == 1
    assert [one["problem"]["n"] for one in store.entries(KIND)] == [0, 1, 2]


def test_a_lock_that_is_not_released_means_memory_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_LOCK_S", 0.01)
    store = Cache(tmp_path)
    with cache._locked(tmp_path / FILE), pytest.warns(RuntimeWarning, match="memory alone"):
        store.put(KIND, [entry(1, a=1.0)])
        store.flush()
    assert len(store.entries(KIND)) == 1


def test_no_folder_means_memory_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *a, **k: cache.Path("~/.cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="memory alone: there is no home"):
        store = USER_CACHE.__wrapped__()
    store.put(KIND, [entry(1, a=1.0)])
    store.flush()
    assert len(store.entries(KIND)) == 1
    assert store.clear() == 1
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_in_the_file_or_an_error(tmp_path):
    store = Cache(tmp_path / "measured")
    store.put(KIND, [entry(1, a=1.0)])
    store.keep(KIND, [entry(1, a=2.0), entry(2, a=1.0)])
    for found in (store.entries(KIND), Cache(store.folder).entries(KIND)):
        assert [one["measured"][0]["ms"] for one in found] == [2.0, 1.0]
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "measured", None):
        with pytest.raises(OSError, match="." if folder else "no home"):
            Cache(folder).keep(KIND, [entry(1, a=1.0)])


def test_threads_put_at_once(tmp_path):
    store = Cache(tmp_path)

    def put(first):
        for n in range(first, first + 10):
            store.put(KIND, [entry(n, a=1.0)])

    threads = [threading.Thread(target=put, args=(10 * t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.flush()
    assert numbers(tmp_path) == list(range(80))
    assert json.loads((tmp_path / FILE).read_text())["version"] == 1


def test_what_stands_in_the_way_of_the_new_file_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / FILE).with_suffix(".new").symlink_to("precious")
    store = Cache(tmp_path)
    store.put(KIND, [entry(1, a=1.0)])
    store.flush()
    assert numbers(tmp_path) == [1]
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / FILE).is_symlink()
    (tmp_path / FILE).chmod(0o600)
    store.put(KIND, [entry(2, a=1.0)])
    store.flush()
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
