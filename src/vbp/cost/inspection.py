"""Describe what can be pruned in a model, and what it costs: before anything is pruned, or afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vbp.cost.widths import WidthCosts
from vbp.errors import InputError, printable
from vbp.pruning.plan import PruningPlan
from vbp.runtime.decode import to_json
from vbp.runtime.tables import format_count, text_table
from vbp.sites.find import find_sites
from vbp.sites.selection import select_sites
from vbp.sites.site import Site, SiteKind


@dataclass(frozen=True)
class SiteDescription:
    """One site as plain data, and the MACs of one image and parameters that would go with all its channels.

    `hidden` counts the channels of the model as it is, `dense` those of the dense model; they are equal where no plan
    was given. `shapes` holds those of the layers' weights. The heads of a `rotatable` site lose directions with the
    criterion auto.
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
    selected: bool = True
    rotatable: bool = False


@dataclass(frozen=True)
class Inspection:
    """The sites of a model in the order in which they run, and what the whole model costs.

    `include` and `exclude` are the patterns that say which sites are selected.
    """

    model: str
    macs: int
    params: int
    sites: tuple[SiteDescription, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        plain: dict[str, Any] = to_json(self)
        return plain

    def table(self) -> str:
        """Return the sites as lines of text, with sums; a site that the patterns leave out has `left out` as kind."""
        head = ("site", "kind", "channels", "of", "MACs", "share", "parameters", "share", "weights")
        rows, selected = [], [site for site in self.sites if site.selected]
        for site in self.sites:
            shapes = " ".join("x".join(map(str, shape)) for shape in site.shapes.values())
            kind = site.kind if site.exact else f"{site.kind} (inexact)"
            kind = f"{kind}, directions" if site.rotatable else kind
            kind = kind if site.selected else "left out"
            rows.append((site.name, kind, *self._costs([site]), shapes))
        groups = {True: "all MLPs", False: "all attention"}
        for mlp, label in groups.items() if len({site.kind == "mlp" for site in self.sites}) == 2 else ():
            part = [site for site in self.sites if (site.kind == "mlp") == mlp]
            rows.append((label, "", *self._costs(part), ""))
        rows.append(("all sites", "", *self._costs(self.sites), ""))
        whole = f"{format_count(self.macs)} MACs, {format_count(self.params)} parameters"
        if self.include or self.exclude:
            rows.append(("selected sites", "", *self._costs(selected), ""))
            whole += f"; include {' '.join(self.include) or 'all'}"
            whole += f", exclude {' '.join(self.exclude)}" if self.exclude else ""
        return f"{printable(self.model)}: {whole}\n{text_table([head, *rows], 'llrrrrrrl')}"

    def _costs(self, sites: Sequence[SiteDescription]) -> tuple[str, ...]:
        """Return the cells of the sums over some sites."""
        macs, params = sum(site.macs for site in sites), sum(site.params for site in sites)
        hidden, dense = sum(site.hidden for site in sites), sum(site.dense for site in sites)
        shares = f"{macs / self.macs:.1%}", f"{params / self.params:.1%}"
        return str(hidden), str(dense), format_count(macs), shares[0], format_count(params), shares[1]


def inspect_model(
    model: nn.Module,
    example: Tensor,
    *,
    attention: bool = False,
    convolutions: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    plans: PruningPlan | Sequence[PruningPlan] = (),
) -> Inspection:
    """Describe a model: its sites, and what it costs.

    Args:
        model: Dense, or pruned.
        example: One image "1 channels height width" on the model's device.
        attention: Refuse a model without attention that can be pruned; otherwise it is described where there is any.
        convolutions: Also look between convolutions with larger kernels.
        include: Patterns over the names of sites: only these are selected, as for `vbp run`; by default all.
        exclude: Patterns of those that are not. Without any pattern those of the last plan hold.
        plans: What was applied to the model, so that the widths of the dense one are known.

    Raises:
        InputError: The model has no site, or a pattern matches none.

    Example:
        >>> vbp.inspect_model(model, example).sites[0].params
        8320
    """
    costs = WidthCosts.of(model, _sites(model, example, attention, convolutions), example)
    applied = (plans,) if isinstance(plans, PruningPlan) else tuple(plans)
    # The first plan that a site is in says its dense width.
    dense = {entry.site.name: entry.site.hidden for plan in reversed(applied) for entry in plan.sites}
    if not include and not exclude and applied:
        include, exclude = applied[-1].include, applied[-1].exclude
    chosen = {site.name for site in select_sites(costs.sites, include, exclude)}
    sites = tuple(
        replace(_describe(model, site, costs, dense.get(site.name, site.hidden)), selected=site.name in chosen)
        for site in costs.sites
    )
    return Inspection(type(model).__name__, costs.macs, costs.params, sites, tuple(include), tuple(exclude))


def _sites(model: nn.Module, example: Tensor, attention: bool, convolutions: bool) -> tuple[Site, ...]:
    try:
        return find_sites(model, example, attention=True, convolutions=convolutions)
    except InputError:
        if attention:
            raise
    return find_sites(model, example, convolutions=convolutions)


def _describe(model: nn.Module, site: Site, costs: WidthCosts, dense: int) -> SiteDescription:
    macs, params = costs.of_site(site)
    shapes = {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in site.layers}
    return SiteDescription(
        site.name, site.kind, site.producers, site.consumer, site.hidden, dense, site.heads, site.exact, shapes,
        macs, params, rotatable=site.rotatable,
    )  # fmt: skip
