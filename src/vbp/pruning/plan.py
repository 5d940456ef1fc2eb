"""Which channels stay: plain data that can be read, saved, sent and applied, and what surgery takes with it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vbp.errors import InputError, one_line
from vbp.method.covariance import ChannelCovariance
from vbp.runtime.choices import Basis, Compensation, Scope
from vbp.runtime.decode import from_json, read_json, to_json
from vbp.runtime.files import write_json
from vbp.runtime.tables import text_table
from vbp.sites.site import Site

_FORMAT = "vbp-plan/3"

# Of before there were directions, and before whole branches went or several layers could read a site.
_OLDER = ("vbp-plan/1", "vbp-plan/2")
_MOST_CHANNELS = 2**24


@dataclass(frozen=True)
class SitePlan:
    """Hold what stays of one site: the indices of the kept channels, ascending; none where its branch goes.

    In the basis `principal` they are directions of each head, those of most variance first, so that each head keeps
    its first ones.

    Example:
        >>> len(plan.sites[0].keep), len(plan.sites[0].removed)
        (65, 63)
    """

    site: Site
    keep: tuple[int, ...]
    basis: Basis = "channels"

    @property
    def removed(self) -> tuple[int, ...]:
        """Return the indices of the channels that go, ascending."""
        kept = set(self.keep)
        return tuple(index for index in range(self.site.hidden) if index not in kept)


@dataclass(frozen=True)
class PruningPlan:
    """Tell which hidden channels of a model stay.

    Attributes:
        sites: One entry a site, in the order in which the sites were found.
        keep_ratio: The share of MLP channels that was asked for.
        scope: Whether MLP channels compete across sites (`global`), each site keeps the same share (`per_layer`), or
            sites of one width keep exactly as many (`equal`).
        round_to: Channels of a site (of a head, in attention) come in multiples of this.
        min_keep_ratio: No site keeps a smaller share than this.
        attn_keep_ratio: The share of every head's channels that was asked for; None without attention sites.
        include: Patterns over names by which the sites were chosen; empty for all.
        exclude: Patterns of those that were left out.

    Example:
        >>> plan.kept, plan.total
        (128, 256)
    """

    sites: tuple[SitePlan, ...]
    keep_ratio: float
    scope: Scope
    round_to: int = 1
    min_keep_ratio: float = 0.0
    attn_keep_ratio: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Return the number of MLP channels of the dense model."""
        return sum(entry.site.hidden for entry in self.sites if entry.site.kind == "mlp")

    @property
    def kept(self) -> int:
        """Return the number of MLP channels that stay."""
        return sum(len(entry.keep) for entry in self.sites if entry.site.kind == "mlp")

    @property
    def requested(self) -> int:
        """Return the number of MLP channels that `keep_ratio` asks for, of all sites together.

        Whether they can be kept is another question: rounding, floors, and with scope `equal` the rounding of each
        site by itself, lead to another number `kept`.
        """
        return round(self.total * self.keep_ratio)

    @property
    def attention_share(self) -> float | None:
        """Return the share of heads' channels, of queries, keys and values, that stays; None without attention."""
        entries = [entry for entry in self.sites if entry.site.kind != "mlp"]
        total = sum(entry.site.hidden for entry in entries)
        return sum(len(entry.keep) for entry in entries) / total if total else None

    @property
    def principal(self) -> tuple[str, ...]:
        """Return the sites that are cut in their principal basis, for which surgery needs covariances."""
        cut = (entry for entry in self.sites if entry.basis == "principal" and len(entry.keep) < entry.site.hidden)
        return tuple(entry.site.name for entry in cut)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Return (kept, total) channels by site name."""
        return {entry.site.name: (len(entry.keep), entry.site.hidden) for entry in self.sites}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"format": _FORMAT, **to_json(self)}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> PruningPlan:
        """Read what `to_dict` returned.

        Raises:
            InputError: The data is no plan, or of another format.
        """
        file_format = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        if file_format not in (_FORMAT, *_OLDER):
            raise InputError(f"a plan must have format {_FORMAT}, got {reprlib.repr(file_format)}; make it again")
        rest = {name: item for name, item in value.items() if name != "format"}
        plan = from_json(PruningPlan, rest, "the plan", use_defaults=file_format in _OLDER)
        for entry in plan.sites:
            _check(entry)
        if len(plan.widths) != len(plan.sites):
            raise InputError(
                f"the plan is damaged: {len(plan.sites)} sites have {len(plan.widths)} names; make it again"
            )
        return plan

    def save(self, path: Path | str) -> None:
        """Write JSON that `load` reads, whole or not at all."""
        write_json(Path(path), self.to_dict())

    @staticmethod
    def load(path: Path | str) -> PruningPlan:
        """Read a file that `save` wrote.

        Raises:
            InputError: The file is missing, damaged or something else.
        """
        try:
            return PruningPlan.from_dict(read_json(Path(path)))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable plan ({one_line(error)}); make the plan again") from error


def _check(entry: SitePlan) -> None:
    site, keep = entry.site, entry.keep
    listed = (rows for rows in (site.offsets, site.strides) if rows)
    if not site.producers or any(len(rows) != len(site.producers) for rows in listed):
        raise InputError(
            f"the plan of the site before {site.consumer} names no producers, or not their rows; make the plan again"
        )
    layers = (bool(site.consumer) * (1 + len(site.others)), len(site.inner))
    given = (len(site.columns), len(site.inner_offsets))
    if any(number and number != count for number, count in zip(given, layers, strict=True)):
        raise InputError(f"the plan of site {site.name} does not tell the place of each layer; make the plan again")
    if not keep and site.branch:
        if site.consumer and not site.consumer.startswith(f"{site.branch}."):
            raise InputError(
                f"the plan removes {site.branch}, which must hold {site.consumer}, and does not; make the plan again"
            )
        return
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= site.hidden:
        raise InputError(
            f"plan of site {site.name} must keep ascending channels of 0..{site.hidden - 1}, at least one; "
            f"got {len(keep)} entries; make the plan again"
        )
    if site.hidden > _MOST_CHANNELS or any(
        not 0 <= first <= _MOST_CHANNELS
        for first in (*site.offsets, *site.strides, *site.columns, *site.inner_offsets)
    ):
        raise InputError(
            f"plan of site {site.name} must have at most {_MOST_CHANNELS} channels, and begin at a row up to that, "
            f"got {site.hidden} from {site.offsets or 0}; make the plan again"
        )
    size = site.hidden // max(1, site.heads)
    if (
        not 1 <= site.heads <= len(keep)
        or size * site.heads != site.hidden
        or (len(set(np.bincount(np.asarray(keep) // size, minlength=site.heads))) > 1)
    ):
        raise InputError(f"plan of site {site.name} must keep as many channels in each head; make the plan again")
    if entry.basis == "principal" and not (
        site.rotatable and site.kind != "mlp" and keep == first_of_heads(site, len(keep) // site.heads)
    ):
        raise InputError(
            f"plan of site {site.name} must keep the first directions of each head, of an attention that allows any "
            "basis; make the plan again"
        )


def first_of_heads(site: Site, count: int) -> tuple[int, ...]:
    """Return the first channels, or directions, of each head."""
    size = site.hidden // site.heads
    return tuple(head * size + index for head in range(site.heads) for index in range(count))


@dataclass(frozen=True)
class Candidate:
    """Hold a plan that was tried: mean KL(dense || pruned) on the held-out images, in nats; channels kept by site."""

    name: str
    divergence: float
    widths: Mapping[str, int]


@dataclass(frozen=True)
class PlanChoice:
    """Hold a plan, and what surgery takes with it.

    Attributes:
        plan: What stays.
        means: For the mean shift and the refit; None without compensation.
        covariances: For the refit: its metric; None without.
        tried: The candidates of the criterion auto, in the order in which they were tried.
        plan_for: Keep ratio -> plan, by the same scores and scope: other sizes without a search, for a budget that is
            not counted in channels.

    Example:
        >>> vbp.auto_plan(model, sites, statistics, reference, keep_ratio=0.5).plan.kept
        128
    """

    plan: PruningPlan
    means: Mapping[str, Tensor] | None
    covariances: Mapping[str, ChannelCovariance] | None
    tried: tuple[Candidate, ...] = ()
    plan_for: Callable[[float], PruningPlan] | None = None

    def compensated_by(self, compensation: Compensation) -> PlanChoice:
        """Return the choice with what a compensation takes, and nothing else.

        Raises:
            InputError: What it takes is not there.
        """
        if compensation != "none" and self.means is None:
            raise InputError(f"compensation {compensation} needs statistics, got none; collect them")
        if compensation == "refit" and self.covariances is None:
            raise InputError(
                "compensation refit needs covariances, got none; collect statistics with covariance=True"
            )
        return replace(
            self,
            means=None if compensation == "none" else self.means,
            covariances=self.covariances if compensation == "refit" else None,
        )

    def table(self) -> str:
        """Return the candidates as lines of text."""
        rows = [(one.name, f"{one.divergence:.4f}") for one in self.tried]
        return text_table([("candidate", "divergence on held-out images"), *rows])
