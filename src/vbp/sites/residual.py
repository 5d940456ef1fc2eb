"""Find where a site's consumer writes into the residual stream.

Libraries nest and name their blocks differently, so the place is found by a test: a known disturbance of the
consumer's output must arrive in the output of a module around it, unchanged but for one factor a channel
(LayerScale), beside something that does not come from the consumer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.layers import channel_dim, first_tensor, groups_of, rows
from vbp.sites.site import Site

# Share of a disturbance's square that rounding may change on its way.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class ResidualAdd:
    """The end of a residual branch, which the site's consumer writes.

    Attributes:
        module: Name of the module whose output is the stream after the branch was added.
        dim: Dimension of its channels, -1 or -3.
        gain: Change of the stream by a unit change of the consumer's output; float64, on the CPU.
    """

    site: Site
    module: str
    dim: int
    gain: Float[Tensor, "out"]


def find_residual_adds(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> tuple[ResidualAdd, ...]:
    """Return where the MLP sites add to the residual stream, in the order in which they run.

    The sites are those of this model, or of the dense one that it was before pruning.
    """
    named = {
        site.consumer: site
        for site in sites
        if site.kind == "mlp" and groups_of(model.get_submodule(site.consumer)) == 1
    }
    around = {name: _ancestors(name) for name in named}
    with evaluation_mode(model), torch.no_grad():
        clean = _run(model, example, {*named, *(one for names in around.values() for one in names)})
        adds = [_find(model, example, named[name], around[name], clean) for name in clean.order if name in named]
    return tuple(add for add in adds if add is not None)


class _Outputs(NamedTuple):
    """Outputs of modules in one forward pass, and the names in the order in which they ran."""

    of: dict[str, Tensor]
    order: list[str]


def _run(model: nn.Module, example: Tensor, names: set[str]) -> _Outputs:
    outputs = _Outputs({}, [])

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.order.append(name)
        if (values := first_tensor(output)) is not None:
            outputs.of[name] = values.clone()  # some models add to it in place

    with hooked((model.get_submodule(name), partial(record, name)) for name in names):
        model(example)
    return outputs


def _ancestors(name: str) -> list[str]:
    """Return the modules around one, the nearest first; not the model itself, whose output is the prediction."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _find(
    model: nn.Module, example: Tensor, site: Site, around: Sequence[str], clean: _Outputs
) -> ResidualAdd | None:
    # A module that is only a container, or returns no tensor, has no output of its own.
    around = [name for name in around if clean.order.count(name) == 1 and name in clean.of]
    if clean.order.count(site.consumer) != 1 or not around:
        return None
    consumer = model.get_submodule(site.consumer)
    given, dim, images = clean.of[site.consumer], channel_dim(consumer), len(example)
    # As large as the stream is, so that rounding stays small against it.
    size = max(float(clean.of[name].std()) for name in around)
    generator = torch.Generator().manual_seed(0)
    disturbance = (size * torch.randn(given.shape, generator=generator)).to(given)
    with hooked([(consumer, lambda module, args, output: output + disturbance)]):
        disturbed = _run(model, example, set(around))
    for name in around:
        for place in (-1, -3):
            gain = _gain(clean.of[name], disturbed.of[name], rows(disturbance, dim, images), place)
            if gain is not None and _is_more(clean.of[name], rows(given, dim, images), gain, place):
                return ResidualAdd(site, name, place, gain.cpu())
    return None


def _gain(before: Tensor, after: Tensor, disturbance: Tensor, dim: int) -> Float[Tensor, "out"] | None:
    """Return the factor of each channel by which the disturbance arrived; None if anything else did."""
    if before.ndim < -dim or before.shape != after.shape or before.shape[dim] != disturbance.shape[-1]:
        return None
    arrived = rows(after.double() - before.double(), dim, len(before))
    if arrived.shape != disturbance.shape:
        return None
    sent = disturbance.double()
    gain = (arrived * sent).sum((0, 1)) / sent.square().sum((0, 1))
    strange = (arrived - gain * sent).square().sum()
    return gain if bool(strange <= _ROUNDING * arrived.square().sum()) and bool(gain.any()) else None


def _is_more(stream: Tensor, given: Tensor, gain: Tensor, dim: int) -> bool:
    """Return whether a stream holds anything beside the consumer's output."""
    values = rows(stream, dim, len(stream)).double()
    rest = values - gain * given.double()
    return bool((rest - rest.mean((0, 1))).square().sum() > _ROUNDING * values.square().sum())
