"""Decide which channels of which groups a step removes: exact counts per ranking scope."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vbp.errors import InputError, some_of
from vbp.method.allocation import AllowedWidths, global_counts
from vbp.sites.cutting import HeadChange
from vbp.torch_pruning.graph import Coupling, canonical_roots, check_indices, pair_gates_, read_group
from vbp.torch_pruning.trial import Removal

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Stack:
    """Units of one layer, each of `width` channels, of which those with the lowest scores are removed.

    At most `removable` units are removed; a layer that loses any keeps a multiple of `step`.
    """

    scores: Float[Tensor, "units"]
    width: int = 1
    removable: int = 0
    step: int = 1


def allocate(stacks: Sequence[Stack], budget: int) -> tuple[list[Int[Tensor, "gone"]], int]:
    """Return for each stack the indices of the units to remove, ascending, and the number of channels they hold.

    They have the lowest scores over all stacks, equal ones in the order of the stacks, then of the units, and hold
    `budget` channels. Where steps, widths or floors make the number unreachable, the nearest one is taken, the
    smaller of two that are as near.
    """
    orders = [torch.argsort(stack.scores, stable=True) for stack in stacks]
    scores = [
        stack.scores.double()[order].repeat_interleave(stack.width).numpy()
        for stack, order in zip(stacks, orders, strict=True)
    ]
    total = sum(len(channels) for channels in scores)
    allowed = []
    for stack in stacks:
        units = len(stack.scores)
        floor = max(units - stack.removable, stack.step)
        allowed.append(AllowedWidths.down_to(floor, units, stack.step, stack.width))
    kept = global_counts(scores, allowed, total - max(budget, 0))
    chosen = [
        order[: len(stack.scores) - count // stack.width].sort().values
        for stack, order, count in zip(stacks, orders, kept, strict=True)
    ]
    return chosen, total - sum(kept)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One whole group that may lose channels, with a score for each channel of its root.

    Attributes:
        heads: Query, key and value layers, if it is an attention.
        units: Channels of the root that are removed together, one row a unit.
    """

    group: Any
    coupling: Coupling
    heads: tuple[nn.Module, ...]
    units: Int[Tensor, "units width"]
    scores: Float[Tensor, "roots"]

    @property
    def root(self) -> nn.Module:
        """Return the layer by whose channels the group is counted."""
        return self.coupling.root


def candidates(pruner: Any) -> list[Candidate]:
    """Return the groups that a pruner may cut, in the order in which their first layers stand in the model.

    Raises:
        InputError: A group's channel numbers do not fit, its channels cannot be divided, or scores are not finite.
    """
    graph = pruner.DG
    pair_gates_(graph)
    order = {module: index for index, module in enumerate(pruner.model.modules())}
    groups: list[tuple[int, Candidate]] = []
    refused: dict[str, InputError] = {}
    for whole in graph.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        name = graph._module2name[whole[0].dep.target.module]
        try:
            candidate = _candidate(pruner, whole, name)
        except InputError as error:
            refused[name] = error
            continue
        if candidate is not None:
            edges = candidate.coupling.producers or candidate.coupling.consumers
            groups.append((min(order.get(edge.layer, len(order)) for edge in edges), candidate))
    if refused:
        first, *others = refused
        raise InputError(
            f"{refused[first]}" + (f" (also refused: {some_of(others)})" if others else "")
        ) from refused[first]
    return [candidate for _, candidate in sorted(groups, key=lambda pair: pair[0])]


def _candidate(pruner: Any, whole: Any, name: str) -> Candidate | None:
    """Return what may be cut of a group that `name` begins; None if it stays whole."""
    group = whole
    attention, heads = pruner._is_atten_group(group)
    if attention:
        group = pruner._downstream_node_as_root_if_attention(group)
        if group is None:
            _log.info("%s belongs to an attention with no prunable layer behind it; it stays whole", name)
            return None
    coupling = read_group(group)
    if not coupling.consumers:
        _log.info("no layer reads the channels of %s (an output of the model); it stays whole", name)
        return None
    check_indices(group)
    scores = pruner.estimate_importance(group)
    if scores is None:
        _log.info("the importance gives no score for %s; it stays whole", name)
        return None
    scores = _checked(scores, len(coupling.channels), name)
    return Candidate(group, coupling, tuple(heads), _units(pruner, group, name), scores)


def _checked(scores: Tensor, width: int, name: str) -> Tensor:
    scores = scores.detach().double().cpu()
    if scores.shape != (width,) or not scores.isfinite().all():
        raise InputError(
            f"the importance of {name} must be {width} finite numbers, got shape {tuple(scores.shape)}, "
            f"{int((~scores.isfinite()).sum())} not finite; check the weights or collect the statistics again"
        )
    return scores


def _units(pruner: Any, group: Any, name: str) -> Tensor:
    """Return the root channels that must be removed together: one of each channel group, a gate with its value."""
    width = len(group[0].idxs)
    groups = 1
    for dependency, _ in group.items:
        writes = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
        by_layer = pruner.out_channel_groups if writes else pruner.in_channel_groups
        groups = math.lcm(groups, by_layer.get(dependency.target.module, 1))
    canonical = canonical_roots(group)
    gated = not torch.equal(canonical, torch.arange(width))
    if width % groups or (gated and groups > 1):
        raise InputError(
            f"the {width} channels of {name} must divide into {groups} equal channel groups, got "
            f"{'a packed gate among them' if gated else 'a remainder'}; put the layer into ignored_layers"
        )
    if gated:
        sizes = set(canonical.unique(return_counts=True)[1].tolist())  # type: ignore[no-untyped-call]
        if len(sizes) > 1:
            raise InputError(
                f"the channels of {name} must go in pairs or one by one, got sets of {sorted(sizes)} that go "
                "together, as in an attention; put the layer into ignored_layers, or give num_heads for it"
            )
        ranked = torch.argsort(canonical, stable=True)
        return ranked.reshape(-1, sizes.pop())
    return torch.arange(width).reshape(groups, width // groups).T


def plan_step(pruner: Any) -> list[Removal]:
    """Return what the pruner's current step removes.

    Raises:
        InputError: A group is refused.
    """
    groups = list(candidates(pruner))
    for candidate in groups:
        pruner.initial_units.setdefault(candidate.root, (len(candidate.units), candidate.units.shape[1]))
    heads_gone = _plan_heads(pruner, groups)
    scopes: dict[Hashable, tuple[float, list[Candidate]]] = {}
    for candidate in groups:
        if pruner.prune_head_dims or not candidate.heads:
            scope, ratio = _scope(pruner, candidate)
            scopes.setdefault(scope, (ratio, []))[1].append(candidate)
    gone: dict[nn.Module, Tensor] = {}
    for ratio, members in scopes.values():
        gone.update(_plan_scope(pruner, members, ratio, heads_gone))
    return [removal for candidate in groups if (removal := _removal(pruner, candidate, gone, heads_gone)).channels]


def _plan_scope(
    pruner: Any, members: list[Candidate], ratio: float, heads_gone: dict[nn.Module, Tensor]
) -> dict[nn.Module, Tensor]:
    stacks: list[Stack] = []
    total = already = 0
    for member in members:
        units, width = pruner.initial_units[member.root]
        total += units * width
        already += (units - len(member.units)) * width
        heads_left = member.units.shape[1] - len(heads_gone.get(member.root, ()))
        kept_least = units * width - math.floor(units * width * pruner.max_pruning_ratio + 1e-9)
        least = max(1, math.ceil(kept_least / heads_left))
        # A width in units that makes the number of channels a multiple of round_to.
        step = (pruner.round_to or 1) // math.gcd(pruner.round_to or 1, heads_left)
        scores = member.scores[member.units].mean(1)
        stacks.append(Stack(scores, width, max(0, len(member.units) - least), step))
    budget = round(total * ratio) - already
    chosen, removed = allocate(stacks, budget)
    if removed != max(budget, 0):
        _log.warning(
            "asked to remove %d channels of %s, the nearest that max_pruning_ratio, round_to and channel groups "
            "allow is %d",
            budget,
            ", ".join(pruner.DG._module2name[member.root] for member in members),
            removed,
        )
    return {member.root: units for member, units in zip(members, chosen, strict=True)}


def _plan_heads(pruner: Any, groups: list[Candidate]) -> dict[nn.Module, Tensor]:
    """Choose whole heads, if the pruner removes them: all attentions together, or each by itself."""
    scopes: dict[Hashable, list[Candidate]] = {}
    for candidate in groups:
        if candidate.heads and pruner.prune_num_heads:
            own = not pruner.global_pruning or candidate.heads[0] in pruner.head_pruning_ratio_dict
            scopes.setdefault(candidate.root if own else "all attentions", []).append(candidate)
    gone = {}
    for members in scopes.values():
        stacks, initial = [], 0
        for member in members:
            now = {pruner.num_heads[layer] for layer in member.heads}
            if len(now) > 1:
                raise InputError(
                    f"prune_num_heads needs as many query heads as key heads in an attention, got {sorted(now)} at "
                    f"{pruner.DG._module2name[member.heads[0]]}; set prune_num_heads=False"
                )
            heads, before = now.pop(), pruner.init_num_heads[member.heads[0]]
            initial += before
            scores = member.scores.reshape(heads, -1).mean(1)
            most = math.floor(before * pruner.max_pruning_ratio + 1e-9) - (before - heads)
            stacks.append(Stack(scores, 1, max(0, min(most, heads - 1))))
        ratio = pruner.get_target_head_pruning_ratio(members[0].heads[0])
        budget = round(initial * ratio) - (initial - sum(len(stack.scores) for stack in stacks))
        chosen, _ = allocate(stacks, budget)
        gone.update({member.root: heads for member, heads in zip(members, chosen, strict=True)})
    return gone


def _scope(pruner: Any, candidate: Candidate) -> tuple[Hashable, float]:
    """Return the set of groups within which a group's channels are ranked, and its share to remove by this step."""
    for dependency, _ in candidate.group.items:
        layer = dependency.target.module
        if layer in pruner._layer_to_scope and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
            return pruner._layer_to_scope[layer][0], pruner.pruning_ratio_dict[layer][pruner.current_step]
    ratio = pruner.per_step_pruning_ratio[pruner.current_step]
    if pruner.isomorphic:
        pattern = tuple(
            (type(dependency.target.module), pruner.DG.is_out_channel_pruning_fn(dependency.handler))
            for dependency, _ in candidate.group.items
        )
        return pattern, ratio
    return ("all layers" if pruner.global_pruning else candidate.root), ratio


def _removal(
    pruner: Any, candidate: Candidate, gone: dict[nn.Module, Tensor], heads_gone: dict[nn.Module, Tensor]
) -> Removal:
    graph, root = pruner.DG, candidate.group[0].dep
    units, heads = gone.get(candidate.root, torch.tensor([], dtype=torch.long)), heads_gone.get(candidate.root)
    channels = set(candidate.units[units].flatten().tolist())
    change = None
    if candidate.heads:
        number = pruner.num_heads[candidate.heads[0]]
        dim = len(candidate.scores) // number
        removed = [] if heads is None else heads.tolist()
        channels |= {head * dim + channel for head in removed for channel in range(dim)}
        names = tuple(graph._module2name[layer] for layer in candidate.heads)
        dim_left = dim - len(units) * candidate.units.shape[1] // number
        change = HeadChange(names, number, dim, number - len(removed), dim_left)
    return Removal(root.target.module, root.handler, sorted(channels), change)
