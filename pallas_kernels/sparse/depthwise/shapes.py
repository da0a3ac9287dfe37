"""Named shapes, shared by benchmarks and the tuner: layers of as many features as channels."""

from pallas_kernels.sparse.shapes import Shape

SHAPES: dict[str, Shape] = {
    f"room_{count}_128": Shape(count, 128, 128) for count in (10_000, 100_000, 1_000_000)
}
