"""The Swift package: its format, its own tests, and Apple's frameworks as it calls them."""

import os
import shutil

import pytest
from helpers.swift import FAKES, PACKAGE, replaced

pytestmark = pytest.mark.swift

SOURCES = PACKAGE / "Sources/WTConvCore"


def test_sources_are_formatted(swift):
    swift.succeed("swift", "format", "lint", "--strict", "-r", "-p", PACKAGE, FAKES)


def test_the_package_passes_its_tests(plain):
    plain.call("test", "--skip-build")


# Metal's kernels run in another order of their threads each time.
@pytest.mark.parametrize("order", "0123")
def test_the_package_passes_its_tests_on_fakes(fake, metal, order):
    done = fake.test(FAKE_METAL=str(metal), FAKE_METAL_ORDER=order)
    assert done.returncode == 0, done.stderr
    assert "MetalTests passed" in done.stderr


@pytest.mark.parametrize("barrier", "1234")
def test_a_barrier_of_the_cascades_is_missed(fake, metal, barrier):
    """Some order of threads shows that it is not there."""
    settings = {"FAKE_METAL": str(metal), "FAKE_METAL_WITHOUT": barrier}
    runs = (
        fake.test("--filter", "MetalTests", FAKE_METAL_ORDER=order, **settings) for order in "0123"
    )
    assert any("metalEqualsTheCPU" in done.stderr for done in runs if done.returncode)


def test_a_wrong_call_of_apples_is_an_error(swift, modules, tmp_path):
    def errors(name, old, new):
        (tmp_path / name).write_text(replaced((SOURCES / name).read_text(), {old: new}))
        command = ["swiftc", "-typecheck", "-swift-version", "6", "-warnings-as-errors"]
        done = swift.run(*command, "-I", modules, *sorted(tmp_path.glob("*.swift")))
        shutil.copy(SOURCES / name, tmp_path)
        return [line for line in done.stderr.splitlines() if "error:" in line]

    for path in SOURCES.glob("*.swift"):
        shutil.copy(path, tmp_path)
    bundle = "import Foundation\n\nextension Bundle { static var module: Bundle { main } }\n"
    (tmp_path / "Bundle.swift").write_text(bundle)
    metal, core_ml = "MetalHaarRunner.swift", "CoreMLWTConvRunner.swift"
    offset, compile = "setBuffer(buffer, offset: 0", "try await MLModel.compileModel"
    assert not errors(metal, offset, offset)
    assert "incorrect argument label" in errors(metal, offset, "setBuffer(buffer, at: 0")[0]
    sync = compile.replace("await ", "")
    assert "not marked with 'await'" in errors(core_ml, compile, sync)[0]


def test_what_is_shipped_knows_no_fake():
    for folder, _, names in os.walk(PACKAGE):
        assert "fake" not in folder.lower()
        assert not [name for name in names if "fake" in name.lower()]
