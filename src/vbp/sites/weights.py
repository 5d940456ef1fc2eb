"""The parts of a model's weights that go with each channel of a site."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from vbp.sites.site import Site


@dataclass(frozen=True)
class WeightSlice:
    """The part of one weight that goes with the channels of a site.

    Attributes:
        parameter: Dotted name.
        dim: Dimension along which the channels lie.
        first: Where the site's first channel lies.
        channels: How many there are.
    """

    parameter: str
    dim: int
    first: int
    channels: int

    def of(self, tensor: Tensor) -> Float[Tensor, "hidden rest"]:
        """Return the slice of the weight, or of a tensor of its shape, a row a channel, in float64."""
        rows = tensor.detach().narrow(self.dim, self.first, self.channels).movedim(self.dim, 0)
        return rows.reshape(self.channels, -1).double()


def weight_slices(model: nn.Module, site: Site) -> tuple[WeightSlice, ...]:
    """Return the weights that go with a site's channels."""
    slices = [WeightSlice(f"{name}.weight", 0, first, site.hidden) for name, first in site.rows]
    for name in site.inner:
        inner = model.get_submodule(name)
        if isinstance(inner.weight, Tensor):  # a norm may have none
            slices.append(WeightSlice(f"{name}.weight", -1 if isinstance(inner, nn.LayerNorm) else 0, 0, site.hidden))
    if site.consumer:
        slices.append(WeightSlice(f"{site.consumer}.weight", 1, 0, site.hidden))
    return tuple(slices)
