"""nnx layers with the parameters of a table."""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.typing import DTypeLike

from flash_wtconv_jax.functional import arguments
from flash_wtconv_jax.functional.wtconv import Parameter


class Parameterised(nnx.Module):
    """A layer with the parameters of a table, each an attribute of its name."""

    param_dtype: DTypeLike

    def _make(self, table: Mapping[str, Parameter], rngs: nnx.Rngs) -> None:
        """Make the parameters."""
        self.parameter_names = tuple(table)
        # One key from the stream for the layer: a stream's count is slow to advance under tracing.
        keys = jax.random.split(arguments.checked_rngs(rngs).params(), max(len(table), 1))
        for key, (name, entry) in zip(keys, table.items(), strict=False):
            setattr(self, name, nnx.Param(entry.init(key, entry.shape, self.param_dtype)))

    def _params(self) -> dict[str, jax.Array]:
        """The values of the parameters by name."""
        return {name: getattr(self, name)[...] for name in self.parameter_names}
