"""Apply a plan to a model: the consumer is compensated, then the channels are cut out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.method.ridge import RIDGE, Reconstruction, check_ridge
from vbp.pruning.attention import rotate_
from vbp.pruning.compensate import compensate_, refits_logits
from vbp.pruning.plan import PruningPlan, SitePlan
from vbp.runtime.forward import snapshot
from vbp.sites.branches import replace_branches_
from vbp.sites.cutting import cut_sites_
from vbp.sites.layers import inner_channels, input_channels, output_channels, unusual_layer, unusual_layers
from vbp.sites.site import Site
from vbp.sites.trial import why_broken
from vbp.statistics.statistics import observed_names


def prune_(
    model: nn.Module,
    plan: PruningPlan,
    means: Mapping[str, Tensor] | None = None,
    covariances: Mapping[str, ChannelCovariance] | None = None,
    *,
    ridge: float = RIDGE,
) -> tuple[Reconstruction, ...]:
    """Cut the channels that a plan removes out of a model, in place.

    Args:
        model: A model that has the plan's sites at their full width.
        plan: From `make_plan`, or read back.
        means: Site name -> mean of each channel: what a removed channel contributed on average moves into the
            consumer's bias. Without them nothing is compensated.
        covariances: Site name -> second moments of all channels: the consumer's weights of the kept channels are
            refitted to predict what the removed ones would have contributed, and the queries of an attention
            that loses query/key channels. They need means, too. From them come the directions of heads that a plan
            cuts in the principal basis; without means nothing but these is changed.
        ridge: How much the refit is regularised at least, as a share of each kept channel's variance. Where the
            covariance has few samples, it is regularised by channels over samples (`ChannelCovariance.ridge`).

    Returns:
        With covariances, the error at each site's consumer that mean shift would have left and that the refit leaves,
        in the dense model; otherwise nothing.

    Raises:
        InputError: The plan does not fit the model, or means or covariances are missing or unfit. On this and any
            other error the model is left bit for bit as it was.

    Source: VBP paper, sections 3.2 and 3.3; `vbp.refit`.

    Example:
        >>> errors = vbp.prune_(model, plan, statistics.means, statistics.covariances)
        >>> model.blocks[0].mlp.fc1.out_features
        65
    """
    _check_fits(model, plan, means, covariances)
    check_ridge(ridge)
    entries = [entry for entry in plan.sites if len(entry.keep) < entry.site.hidden]
    restore = snapshot(_touched(model, entries), "_parameters", "_buffers")
    try:
        if covariances is not None:
            means, covariances = rotate_(model, entries, means, covariances)
        errors = () if means is None else compensate_(model, entries, means, covariances, ridge)
        cut_sites_(model, [(entry.site, entry.keep) for entry in entries if entry.keep])
        replace_branches_(model, [entry.site for entry in entries if not entry.keep])
    except BaseException:  # an interruption too: half a surgery is no model
        restore()
        raise
    return errors


def cut_(model: nn.Module, plan: PruningPlan) -> None:
    """Cut a model to the widths of a plan, in place, whatever its weights: they are not compensated nor rotated.

    For a count of what the pruned model costs, or for weights that will be loaded into it.

    Raises:
        InputError: The plan does not fit the model, which is then left as it was.
    """
    channels = [replace(entry, basis="channels") for entry in plan.sites]
    prune_(model, replace(plan, sites=tuple(channels)))


def _touched(model: nn.Module, entries: Sequence[SitePlan]) -> list[nn.Module]:
    """Return the modules that surgery writes to: layers, and those that hold them or bare parameters."""
    names = {name for entry in entries for name in (*entry.site.layers, *entry.site.inner)}
    owners = {name.rpartition(".")[0] for entry in entries for name in (*names, *entry.site.parameters)}
    return [model.get_submodule(name) for name in sorted(names | owners)]


def check_prunable(model: nn.Module, sites: Sequence[Site], example: Tensor) -> None:
    """Try on a copy whether the model still runs with a part of the channels of every site.

    Some models write a width into their code, where no look at their layers shows it.

    Raises:
        InputError: It does not run; the sites that break it are named. The model is untouched.
    """
    if why_broken(model, sites, example) is None:
        return
    # One trial for the sites of each block: what one call makes and reads stands or falls together.
    blocks: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        blocks[site.producers[0].rpartition(".")[0]].append(site)
    reasons = {block: reason for block, group in blocks.items() if (reason := why_broken(model, group, example))}
    raise InputError(
        f"{type(model).__name__} does not run as it should with fewer channels in "
        f"{', '.join(reasons) or 'all its sites together'}: "
        f"{next(iter(reasons.values()), 'each alone does')}. Leave attention (--bottleneck) out, or give vbp.prune_ "
        "a plan without these sites"
    )


def _check_fits(
    model: nn.Module,
    plan: PruningPlan,
    means: Mapping[str, Tensor] | None,
    covariances: Mapping[str, ChannelCovariance] | None,
) -> None:
    if isinstance(model, DistributedDataParallel):
        raise InputError(
            "a model must be pruned before DistributedDataParallel wraps it, which keeps the weights that it was "
            "given; prune model.module and wrap it again"
        )
    principal = plan.principal
    if principal and covariances is None:
        raise InputError(
            f"the plan cuts {len(principal)} sites in their principal basis ({principal[0]} first), which comes from "
            "covariances, got none; collect statistics with covariance=True and give statistics.covariances"
        )
    if covariances is not None and means is None and not principal:
        raise InputError("covariances need the means as well, got none; give statistics.means")
    unusual = unusual_layers(model)
    rows: dict[str, list[int]] = defaultdict(list)
    for entry in plan.sites:
        for name, places in entry.site.places:
            rows[name] += places
    claimed = {name: len(places) for name, places in rows.items()}
    for entry in plan.sites:
        site = entry.site
        for name in (*site.layers, *site.inner, *site.parameters):
            if name in unusual:
                raise InputError(f"the plan's site {site.name} is none: {unusual_layer(name, unusual[name])}")
        try:
            widths = [(output_channels(model.get_submodule(name)), claimed[name]) for name in site.producers]
            for reader in site.readers:
                width = input_channels(model.get_submodule(reader.layer))
                widths.append(_share(width, reader.first, site.hidden, whole=not site.columns))
            for name, first in site.passed:
                width = inner_channels(model.get_submodule(name))
                widths.append(_share(width, first, site.hidden, whole=not site.inner_offsets))
            widths += [(model.get_parameter(name).numel(), site.hidden) for name in site.parameters]
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"the plan's site {site.name} does not exist in {type(model).__name__} ({error}); "
                "give the model that the plan was made for"
            ) from error
        if any(width != wanted for width, wanted in widths):
            raise InputError(
                f"the plan's site {site.name} must have {site.hidden} channels, got widths "
                f"{[width for width, _ in widths]} where {[wanted for _, wanted in widths]} belong; give the dense "
                "model that the plan was made for"
            )
        for name in site.producers:
            if sorted(rows[name]) != list(range(claimed[name])):
                begins = sorted(first for entry in plan.sites for one, first in entry.site.rows if one == name)
                raise InputError(
                    f"the plan's sites must have each of the rows 0 to {claimed[name]} of {name} once, got sites "
                    f"that begin at {begins[:4]}; make the plan again"
                )
        _check_holds(site, means, covariances)


def _share(width: int, first: int, hidden: int, *, whole: bool) -> tuple[int, int]:
    """Return a layer's channels that lie where those of a site should, and their number if the layer fits."""
    return (width if whole else max(0, min(width - first, hidden))), hidden


def _check_holds(
    site: Site, means: Mapping[str, Tensor] | None, covariances: Mapping[str, ChannelCovariance] | None
) -> None:
    if means is not None:
        for reader in site.readers:
            shape = tuple(means[reader.key].shape) if reader.key in means else "none"
            if shape != (site.hidden,):
                raise InputError(
                    f"means of site {reader.key} must be {site.hidden} numbers, got {shape}; collect its statistics"
                )
    if covariances is not None and (site.consumer or refits_logits(site)):
        for name in observed_names(site):
            width = len(covariances[name].mean) if name in covariances else "none"
            if width != site.hidden:
                raise InputError(
                    f"the covariance of site {name} must be of {site.hidden} channels, got {width}; collect its "
                    "statistics with covariance=True"
                )
