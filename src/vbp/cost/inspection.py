"""What can be pruned in a model, and what it costs: before anything is pruned, or afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vbp.cost.macs import count_parameters, macs_by_module
from vbp.cost.widths import attention_products
from vbp.pruning.plan import PruningPlan
from vbp.runtime.decode import to_json
from vbp.runtime.tables import format_count, text_table
from vbp.sites.layers import input_channels, output_channels
from vbp.sites.site import Site, SiteKind, find_sites


@dataclass(frozen=True)
class SiteDescription:
    """One site: what it is, and what its channels cost.

    Attributes:
        name: Key of the site in plans and reports.
        kind: `mlp`, `value` or `query_key`.
        producers: Layers whose rows make the channels.
        consumer: The layer that reads them; empty for query/key channels.
        hidden: Channels of the model as it is.
        dense: Channels of the dense model; `hidden` where no plan says otherwise.
        heads: Heads that share the channels; 1 in an MLP.
        exact: Whether the mean shift is exact there.
        shapes: Layer -> shape of its weight.
        macs: Multiply-accumulates of one image that would go with all channels of the site.
        params: Parameters that would go with them.
    """

    name: str
    kind: SiteKind
    producers: tuple[str, ...]
    consumer: str
    hidden: int
    dense: int
    heads: int
    exact: bool
    shapes: Mapping[str, tuple[int, ...]]
    macs: int
    params: int


@dataclass(frozen=True)
class Inspection:
    """The sites of a model in the order in which they run, and what the whole model costs."""

    model: str
    macs: int
    params: int
    sites: tuple[SiteDescription, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        plain: dict[str, Any] = to_json(self)
        return plain

    def table(self) -> str:
        """Return the sites as lines of text, with sums."""
        head = ("site", "kind", "channels", "of", "MACs", "share", "parameters", "share", "weights")
        rows = [
            (
                site.name,
                site.kind if site.exact else f"{site.kind} (inexact)",
                str(site.hidden),
                str(site.dense),
                format_count(site.macs),
                f"{site.macs / self.macs:.1%}",
                format_count(site.params),
                f"{site.params / self.params:.1%}",
                " ".join("x".join(map(str, shape)) for shape in site.shapes.values()),
            )
            for site in self.sites
        ]
        macs, params = sum(site.macs for site in self.sites), sum(site.params for site in self.sites)
        hidden, dense = sum(site.hidden for site in self.sites), sum(site.dense for site in self.sites)
        rows.append((
            "all sites", "", str(hidden), str(dense), format_count(macs), f"{macs / self.macs:.1%}",
            format_count(params), f"{params / self.params:.1%}", "",
        ))  # fmt: skip
        whole = f"{format_count(self.macs)} MACs, {format_count(self.params)} parameters"
        return f"{self.model}: {whole}\n{text_table([head, *rows], 'llrrrrrrl')}"


def inspect_model(
    model: nn.Module,
    example: Tensor,
    *,
    attention: bool = False,
    convolutions: bool = False,
    plans: PruningPlan | Sequence[PruningPlan] = (),
) -> Inspection:
    """Describe a model: its sites, and what it costs.

    Args:
        model: Dense, or pruned.
        example: One image "1 channels height width" on the model's device.
        attention: Also describe value, and query and key, channels.
        convolutions: Also look between convolutions with larger kernels.
        plans: What was applied to the model, so that the widths of the dense one are known.

    Raises:
        InputError: The model has no site.
    """
    sites = describe_sites(model, example, attention=attention, convolutions=convolutions, plans=plans)
    return Inspection(type(model).__name__, macs_by_module(model, example)[""], count_parameters(model), sites)


def describe_sites(
    model: nn.Module,
    example: Tensor,
    *,
    attention: bool = False,
    convolutions: bool = False,
    plans: PruningPlan | Sequence[PruningPlan] = (),
) -> tuple[SiteDescription, ...]:
    """Describe each site of a model; the arguments are those of `inspect_model`.

    Raises:
        InputError: The model has no site.
    """
    sites = find_sites(model, example, attention=attention, convolutions=convolutions)
    macs = macs_by_module(model, example)
    dense: dict[str, int] = {}
    for plan in (plans,) if isinstance(plans, PruningPlan) else plans:
        for entry in plan.sites:
            dense.setdefault(entry.site.name, entry.site.hidden)
    return tuple(_describe(model, site, macs, dense) for site in sites)


def _describe(model: nn.Module, site: Site, macs: Mapping[str, int], dense: Mapping[str, int]) -> SiteDescription:
    layers = list(dict.fromkeys((*site.producers, *([site.consumer] if site.consumer else []))))
    return SiteDescription(
        name=site.name,
        kind=site.kind,
        producers=site.producers,
        consumer=site.consumer,
        hidden=site.hidden,
        dense=dense.get(site.name, site.hidden),
        heads=site.heads,
        exact=site.exact,
        shapes={name: tuple(model.get_parameter(f"{name}.weight").shape) for name in layers},
        macs=_site_macs(model, site, macs),
        params=_site_params(model, site),
    )


def _site_macs(model: nn.Module, site: Site, macs: Mapping[str, int]) -> int:
    total = sum(macs.get(name, 0) * _share_of_rows(model, name, site) for name in site.producers)
    total += macs.get(site.consumer, 0) * _share_of_columns(model, site) if site.consumer else 0
    total += sum(macs.get(name, 0) for name in site.inner)
    return round(total + (attention_products(model, site, macs) if site.kind != "mlp" else 0))


def _site_params(model: nn.Module, site: Site) -> int:
    total = 0.0
    for name in site.producers:
        total += count_parameters(model.get_submodule(name)) * _share_of_rows(model, name, site)
    if site.consumer:
        total += model.get_parameter(f"{site.consumer}.weight").numel() * _share_of_columns(model, site)
    total += sum(count_parameters(model.get_submodule(name)) for name in site.inner)
    return round(total + sum(model.get_parameter(name).numel() for name in site.parameters))


def _share_of_rows(model: nn.Module, layer: str, site: Site) -> float:
    return site.hidden / output_channels(model.get_submodule(layer))


def _share_of_columns(model: nn.Module, site: Site) -> float:
    return site.hidden / input_channels(model.get_submodule(site.consumer))
