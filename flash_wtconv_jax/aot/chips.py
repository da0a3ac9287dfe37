"""The TPUs that programs are compiled for, and how fast each can be at best."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A TPU: the topology to compile for, and the figures that bound a kernel on it.

    `cores` is the number of TensorCores that share one program, `delay_slots` how many bundles
    after a branch are executed before it takes effect (read off the compiler's listings).
    """

    topology: str
    cores: int
    clock_hz: float
    hbm_bytes_per_s: float
    delay_slots: int = 4

    @property
    def hbm_bytes_per_cycle(self) -> float:
        """Bytes that HBM moves in one cycle of the chip.

        Example:
            >>> CHIPS["v5e"].hbm_bytes_per_cycle
            546.0
        """
        return self.hbm_bytes_per_s / self.clock_hz


# Bandwidths are those of cloud.google.com/tpu/docs. Clocks follow from the peak bfloat16 rates
# there and the matrix units: v5e 197e12 / (4 * 128**2 * 2), v6e 918e12 / (4 * 256**2 * 2),
# v5p 459e12 / (2 * 4 * 128**2 * 2), v4 275e12 / (2 * 4 * 128**2 * 2).
CHIPS: dict[str, Chip] = {
    "v5e": Chip("v5e:2x2", 1, 1.5e9, 819e9),
    "v6e": Chip("v6e:2x2", 1, 1.75e9, 1640e9),
    "v5p": Chip("v5p:2x2x1", 2, 1.75e9, 2765e9),
    "v4": Chip("v4:2x2x1", 2, 1.05e9, 1228e9, delay_slots=1),
}
"""The chips by the name that `flash-wtconv tpu-report --chip` takes."""

VALU_LANES = 4 * 8 * 128
"""Elements that a TensorCore computes in a cycle: four slots on registers of 8 x 128 lanes."""
