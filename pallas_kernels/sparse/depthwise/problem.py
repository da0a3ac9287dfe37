"""The description of a call that implementations, tables and the tuner get."""

from pallas_kernels.sparse import problem


class Problem(problem.Problem):
    """A call as implementations see it; its groups and features are its channels."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weights as implementations get them, `[K, C]`."""
        return self.window.taps, self.features
