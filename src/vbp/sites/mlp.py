"""MLPs of two plain layers around an activation that can be computed again from their inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.activations import Activation, find_activation
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.layers import channel_dim, maps_positions, output_channels, rows
from vbp.sites.site import Site


@dataclass(frozen=True)
class FoundMLP:
    """An MLP site of one hidden layer, a known activation and a consumer, and nothing else between them."""

    site: Site
    activation: Activation


def find_mlps(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> tuple[FoundMLP, ...]:
    """Return the sites of a dense model whose hidden layer can be refitted: none that is gated or has a norm inside.

    Nor one between whose layers and those of another site channels go, for these read and return fewer in the pruned
    model. The example is a batch of images.
    """
    makers, readers = Counter[str](), Counter[str]()
    for site in sites:
        makers.update({*site.producers})
        readers.update(reader.layer for reader in site.readers)
    plain = [
        site
        for site in sites
        if _is_plain(model, site) and not readers[site.producers[0]] and not makers[site.consumer]
    ]
    seen: dict[str, list[Tensor]] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        dim = channel_dim(module)
        seen.setdefault(name, []).extend(rows(one, dim, len(example)).clone() for one in (args[0], output))

    names = {layer for site in plain for layer in (site.producers[0], site.consumer)}
    hooks = [(model.get_submodule(name), partial(record, name)) for name in names]
    with hooked(hooks), evaluation_mode(model), torch.no_grad():
        model(example)
    mlps = []
    for site in plain:
        made, read = seen.get(site.producers[0], []), seen.get(site.consumer, [])
        if len(made) == len(read) == 2 and (activation := find_activation(made[1], read[0])) is not None:
            mlps.append(FoundMLP(site, activation))
    return tuple(mlps)


def check_mlps(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> tuple[FoundMLP, ...]:
    """Find MLPs as `find_mlps` does, and refuse a model without any.

    Raises:
        InputError: There is none.
    """
    mlps = find_mlps(model, example, sites)
    if not mlps:
        raise InputError(
            f"the refit of the producers needs an MLP of two layers with an activation of single values between "
            f"them, got {type(model).__name__}, where there is none; leave the producers as they are"
        )
    return mlps


def _is_plain(model: nn.Module, site: Site) -> bool:
    if site.kind != "mlp" or len(site.producers) != 1 or site.inner or site.parameters or site.others or site.columns:
        return False
    producer, consumer = (model.get_submodule(name) for name in (site.producers[0], site.consumer))
    return all(maps_positions(layer) for layer in (producer, consumer)) and output_channels(producer) == site.hidden
