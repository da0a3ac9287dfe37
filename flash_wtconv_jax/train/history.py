"""The history of a training, epoch by epoch."""

import dataclasses


@dataclasses.dataclass
class History:
    """Mean training loss and held-out accuracy of each epoch."""

    loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)
