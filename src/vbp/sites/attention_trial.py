"""Try on a copy of the model what an attention does with fewer channels in each head.

Code may compute the scale of the softmax from the number of channels that are left, by whatever expression, or keep a
number of channels where no look at the layers shows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vbp.errors import first_line
from vbp.runtime.forward import ExampleInputs, call_values, copy_model, evaluation_mode, hooked, run_model
from vbp.sites.cutting import cut_sites_
from vbp.sites.layers import channel_dim
from vbp.sites.site import Site

# Values, and queries with keys, of one attention; None for queries and keys that stay.
AttentionSites = tuple[Site, Site | None]

# How near the right one of two scales comes to the dense model, at least, against the wrong one.
_NEAR = 0.25

# A difference of the outputs, against their size, that says nothing.
_NOTHING = 1e-4

# What goes wrong where code needs the widths that it was written for.
_RUNS = (RuntimeError, ValueError, IndexError, AssertionError, AttributeError, TypeError)


def try_attentions(
    model: nn.Module, example_inputs: ExampleInputs, attentions: Sequence[AttentionSites]
) -> list[AttentionSites | str]:
    """Return for each attention its sites as they show by running, or why they are none.

    Half of the channels of each head are removed. What the consumer of the values then reads must be what it reads in
    a dense model whose removed channels are 0: as the attention is, or after its queries are scaled
    (`implicit_scale`). Where that also holds with half of the values alone, they are `separate`.
    """
    if not attentions:
        return []
    results = _try(model, example_inputs, attentions)
    if isinstance(results, str):
        if len(attentions) == 1:
            return [results]
        return [one for sites in attentions for one in try_attentions(model, example_inputs, [sites])]
    tried = [sites for sites in results if not isinstance(sites, str)]
    apart = _separate(model, example_inputs, tried)
    return [
        sites
        if isinstance(sites, str) or sites not in apart
        else (replace(sites[0], separate=True), sites[1] and replace(sites[1], separate=True))
        for sites in results
    ]


def _try(
    model: nn.Module, example_inputs: ExampleInputs, attentions: Sequence[AttentionSites]
) -> list[AttentionSites | str] | str:
    """Return the results of all attentions, or why the model does not run with fewer channels in them."""
    trial = _Trial(model, example_inputs, attentions)
    try:
        errors = [trial.errors(implicit=implicit) for implicit in (False, True)]
    except _RUNS as error:
        return f"the model does not run with fewer channels in its heads: {first_line(error)}"
    results: list[AttentionSites | str] = []
    for (value, pair), free, scaled in zip(attentions, *errors, strict=True):
        if max(free, scaled) <= _NOTHING:
            results.append((value, pair))  # the scale cannot be told from this example
        elif pair is not None and min(free, scaled) <= _NEAR * max(free, scaled):
            results.append((value, replace(pair, implicit_scale=scaled < free)))
        else:
            results.append("what it computes depends in another way on the number of channels in a head")
    return results


def _separate(
    model: nn.Module, example_inputs: ExampleInputs, attentions: Sequence[AttentionSites]
) -> list[AttentionSites]:
    """Return the attentions whose values may lose channels alone.

    What code does with widths is the same in all attentions of one class: the first of each speaks for the others,
    until all that pass are tried together.
    """
    alike: dict[object, list[AttentionSites]] = defaultdict(list)
    for value, pair in attentions:
        owner = model.get_submodule(value.consumer.rpartition(".")[0])
        alike[type(owner), pair is None].append((value, pair))
    passed = [group for group in alike.values() if not group[0][1] or _alone(model, example_inputs, group[:1])]
    together = [sites for group in passed for sites in group]
    if len(together) > len(passed) and not _alone(model, example_inputs, together):
        return [sites for sites in together if _alone(model, example_inputs, [sites])]
    return together


def _alone(model: nn.Module, example_inputs: ExampleInputs, attentions: Sequence[AttentionSites]) -> bool:
    """Return whether the values of all these attentions can lose channels alone."""
    try:
        return max(_Trial(model, example_inputs, attentions).errors(values_alone=True)) <= _NOTHING
    except _RUNS:
        return False


class _Trial:
    """Removes half of the channels of attentions from copies of a model, and compares."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, attentions: Sequence[AttentionSites]) -> None:
        self._attentions = attentions
        self._dense = copy_model(model)
        self._run = _Run(example_inputs, attentions)
        self._run.observe(self._dense)
        _draw_(self._dense, [pair for _, pair in attentions if pair is not None])
        _silence_(self._dense, [value for value, _ in attentions])
        self._expected = self._run.outputs(self._dense)

    def errors(self, *, implicit: bool = False, values_alone: bool = False) -> list[float]:
        """Return by how much what each consumer of values reads is off, against its size."""
        cuts = [
            (replace(site, implicit_scale=implicit and not site.consumer), half(site))
            for sites in self._attentions
            for site in sites
            if site is not None and not (values_alone and site.kind == "query_key")
        ]
        trial = copy_model(self._dense)
        cut_sites_(trial, cuts)
        found = self._run.outputs(trial)
        errors = []
        for value, _ in self._attentions:
            whole, layer = self._expected[value.consumer].double(), self._dense.get_submodule(value.consumer)
            kept = torch.tensor(half(value), device=whole.device)
            whole = whole.index_select(whole.ndim + channel_dim(layer), kept)
            error, size = (float(one.norm()) for one in (found[value.consumer].double() - whole, whole))
            errors.append(error / max(size, 1e-12))
        return errors


def half(site: Site) -> list[int]:
    """Return every second channel of each head, at least one: code that means the first ones by number shows."""
    size = site.hidden // site.heads
    return [head * size + index for head in range(site.heads) for index in range(min(1, size - 1), size, 2)]


def _draw_(model: nn.Module, pairs: Sequence[Site]) -> None:
    """Set weights of queries and keys by which the softmax tells one scale from another; those that go are 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in pairs:
            kept = set(half(site))
            for name, places in site.places:
                layer = model.get_submodule(name)
                assert isinstance(layer.weight, Tensor)
                rows = layer.weight[list(places)]
                drawn = torch.randn(rows.shape, generator=generator) / rows[0].numel() ** 0.5
                drawn[[row for row in range(site.hidden) if row not in kept]] = 0
                layer.weight[list(places)] = drawn.to(rows)
                if isinstance(layer.bias, Tensor):
                    layer.bias[list(places)] = 0


def _silence_(model: nn.Module, values: Sequence[Site]) -> None:
    """Let consumers read nothing of the channels that go: later layers then read the same with them and without."""
    with torch.no_grad():
        for site in values:
            gone = sorted(set(range(site.hidden)) - set(half(site)))
            model.get_parameter(f"{site.consumer}.weight")[:, gone] = 0


@dataclass
class _Run:
    """Runs a model, and copies of it, with the same inputs of each attention.

    These are drawn at random: on an example the tokens may be all alike, so that no scale of the softmax matters.
    """

    example_inputs: ExampleInputs
    attentions: Sequence[AttentionSites]

    def __post_init__(self) -> None:
        self._inputs: dict[str, Tensor] = {}  # by producer
        self._producers = {name for sites in self.attentions for site in sites if site for name in site.producers}

    def observe(self, model: nn.Module) -> None:
        """Draw inputs for the producers, of the shape of theirs."""
        generator = torch.Generator().manual_seed(1)

        def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = call_values(args, kwargs)[0]
            self._inputs[name] = torch.randn(values.shape, generator=generator).to(values)

        self._run(model, [(model.get_submodule(name), partial(record, name)) for name in self._producers])

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what the consumers of the values read if the producers read what was drawn."""
        seen: dict[str, Tensor] = {}

        def replay(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._inputs[name], *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): self._inputs[name]}

        def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = call_values(args, kwargs)[0].clone()

        hooks = [(model.get_submodule(name), partial(replay, name)) for name in self._producers]
        hooks += [
            (model.get_submodule(value.consumer), partial(record, value.consumer)) for value, _ in self.attentions
        ]
        self._run(model, hooks)
        return seen

    def _run(self, model: nn.Module, before: list[tuple[nn.Module, Any]]) -> None:
        with evaluation_mode(model), torch.no_grad(), hooked(before=before):
            run_model(model, self.example_inputs)
