"""Swift's tools, the fakes of Apple's frameworks, and the package's runner on them."""

import json
import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torch_bridge/coreml/swift"
FAKES = ROOT / "tests/swift/fakes"


class Swift(NamedTuple):
    """Swift 6: `prefix` is what comes before a command, to run it where Swift is."""

    prefix: tuple[str, ...]

    def run(
        self, *command: str | Path, timeout: int = 900, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the package's folder, whatever its exit status."""
        # Another root has another working directory.
        within = ["sh", "-c", 'cd "$0" && exec "$@"', str(PACKAGE)]
        return subprocess.run(
            [*self.prefix, *within, *map(str, command)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def succeed(self, *command: str | Path, **environment: str) -> str:
        """Runs a command that must succeed, and returns what it prints."""
        done = self.run(*command, **environment)
        assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done.stdout


def find() -> Swift | None:
    """Swift where `tests/swift/run` says that it is, or on the path."""
    if "FLASH_WTCONV_SWIFT" in os.environ:
        return Swift(tuple(os.environ["FLASH_WTCONV_SWIFT"].split()))
    return Swift(()) if shutil.which("swift") else None


class Build(NamedTuple):
    """A build of the package, warnings being errors."""

    swift: Swift
    source: Path
    folder: Path
    flags: tuple[str, ...]
    mode: str

    @classmethod
    def make(
        cls,
        swift: Swift,
        folder: Path,
        fakes: Path | None = None,
        source: Path = PACKAGE,
        mode: str = "debug",
    ) -> "Build":
        """Builds into a folder, with the fakes of a folder perhaps; tests in the mode "debug"."""
        flags = ["-Xswiftc", "-warnings-as-errors"]
        if fakes is not None:
            flags += ["-Xswiftc", "-I", "-Xswiftc", str(fakes), "-Xlinker", f"-L{fakes}"]
            for flag in ("-lMetal", "-lCoreML", "-rpath", str(fakes)):
                flags += ["-Xlinker", flag]
        build = cls(swift, source, folder, tuple(flags), mode)
        build.call("build", "-c", mode, *["--build-tests"] * (mode == "debug"))
        return build

    def call(self, command: str, *arguments: str, **environment: str) -> str:
        """Calls one of SwiftPM's commands, which must succeed."""
        place = ["--package-path", str(self.source), "--scratch-path", str(self.folder)]
        return self.swift.succeed("swift", command, *place, *arguments, *self.flags, **environment)

    def test(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the tests of a build on Linux, without what SwiftPM does before."""
        binary = self.folder / "debug" / "WTConvCoreMLPackageTests.xctest"
        library = ["--testing-library", "swift-testing"]
        return self.swift.run(binary, *library, *arguments, **environment)

    @property
    def runner(self) -> Path:
        """The executable."""
        return self.folder / self.mode / "WTConvCoreMLRunner"


def build_fakes(swift: Swift, folder: Path) -> Path:
    """Builds the modules Metal and CoreML into a folder."""
    for name in ("Metal", "CoreML"):
        swift.succeed(
            *("swiftc", "-swift-version", "6", "-warnings-as-errors", "-module-name", name),
            *("-emit-library", "-emit-module", "-emit-module-path", folder / f"{name}.swiftmodule"),
            *(FAKES / f"{name}.swift", "-o", folder / f"lib{name}.so"),
        )
    return folder


def build_metal(folder: Path, faults: Mapping[str, str] | None = None, version: int = 310) -> Path:
    """Builds the library of the fake Metal, with faults in the source that nobody is told of.

    The version of the language is that of macOS 14, or 300 of macOS 13.
    """
    from torch_bridge.wtconv.metal import SOURCE
    from torch_bridge.wtconv.on_cpu.metal import build

    source = SOURCE.read_text(encoding="utf-8")
    library = folder / "metal.so"
    (folder / "metal.so.metal").write_text(source, encoding="utf-8")
    build(replaced(source, faults or {}), library, [f"-D__METAL_VERSION__={version}"])
    return library


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """A text in which each key, which must be there, is its value."""
    for old, new in changes.items():
        assert old in text, f"there is no {old!r}"
        text = text.replace(old, new)
    return text


@contextmanager
def evaluator(folder: Path) -> Iterator[Path]:
    """Answers the fake Core ML in a folder, where it finds two pipes."""
    requests, replies = folder / "requests", folder / "replies"
    for pipe in (requests, replies):
        os.mkfifo(pipe)
    packages: dict[str, object] = {}

    def serve() -> None:
        while text := requests.read_text():
            replies.write_text(json.dumps(_answer(json.loads(text), folder, packages)))

    # It waits for a process that may have died.
    threading.Thread(target=serve, daemon=True).start()
    yield folder
    with suppress(OSError):
        os.close(os.open(requests, os.O_WRONLY | os.O_NONBLOCK))


def _answer(request: dict, folder: Path, packages: dict) -> dict[str, object]:
    from torch_bridge.coreml.evaluator import Package

    try:
        path = request["package"]
        if path not in packages:
            packages[path] = Package(path)
        inputs = {
            name: np.fromfile(folder / f"{name}.f32", "<f4").reshape(shape)
            for name, shape in request["inputs"].items()
        }
        outputs = packages[path].predict(inputs)
        for name, value in outputs.items():
            (folder / f"{name}.f32").write_bytes(np.asarray(value, "<f4").tobytes())
    # The process that asked shows it.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"outputs": {name: value.shape for name, value in outputs.items()}}
