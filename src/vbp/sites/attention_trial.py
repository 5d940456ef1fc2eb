"""Try on a copy of the model what an attention does with fewer channels in each head.

Code may compute the scale of the softmax from the number of channels that are left, by whatever expression, or keep a
number of channels where no look at the layers shows it.
"""

from __future__ import annotations

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

# Values and queries with keys of one attention.
Pair = tuple[Site, Site]

# How near the right one of two scales comes to the dense model, at least, against the wrong one.
_NEAR = 0.25

# A difference of the outputs, against their size, that says nothing.
_NOTHING = 1e-4


def try_attentions(model: nn.Module, example_inputs: ExampleInputs, attentions: Sequence[Pair]) -> list[Pair | str]:
    """Return for each attention its sites, `implicit_scale` as it shows by running, or why they are none.

    Half of the channels of each head are removed. What the consumer of the values then reads must be what it reads in
    a dense model whose removed channels are 0: as the attention is, or after its queries are scaled.
    """
    if not attentions:
        return []
    results = _try(model, example_inputs, attentions)
    if isinstance(results, str):
        if len(attentions) == 1:
            return [results]
        return [one for pair in attentions for one in try_attentions(model, example_inputs, [pair])]
    return results


def _try(model: nn.Module, example_inputs: ExampleInputs, attentions: Sequence[Pair]) -> list[Pair | str] | str:
    """Return the results of all attentions, or why the model does not run with fewer channels in them."""
    dense = copy_model(model)
    run = _Run(example_inputs, attentions)
    run.observe(dense)
    cuts = [(site, half(site)) for pair in attentions for site in pair]
    _draw_(dense, [pair for _, pair in attentions])
    expected = run.outputs(dense)
    found = []
    for implicit in (False, True):
        trial = copy_model(dense)
        try:
            cut_sites_(
                trial, [(replace(site, implicit_scale=implicit and not site.consumer), kept) for site, kept in cuts]
            )
            found.append(run.outputs(trial))
        except (RuntimeError, ValueError, IndexError, AssertionError, AttributeError, TypeError) as error:
            return f"the model does not run with fewer channels in its heads: {first_line(error)}"
    results: list[Pair | str] = []
    for value, pair in attentions:
        whole = expected[value.consumer].double()
        kept = torch.tensor(half(value), device=whole.device)
        whole = whole.index_select(whole.ndim + channel_dim(model.get_submodule(value.consumer)), kept)
        free, scaled = (float((one[value.consumer].double() - whole).norm()) for one in found)
        if max(free, scaled) <= _NOTHING * float(whole.norm()):
            results.append((value, pair))  # the scale cannot be told from this example
        elif min(free, scaled) <= _NEAR * max(free, scaled):
            results.append((value, replace(pair, implicit_scale=scaled < free)))
        else:
            results.append("what it computes depends in another way on the number of channels in a head")
    return results


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
            for name, first in site.rows:
                layer = model.get_submodule(name)
                assert isinstance(layer.weight, Tensor)
                rows = layer.weight[first : first + site.hidden]
                drawn = torch.randn(rows.shape, generator=generator) / rows[0].numel() ** 0.5
                drawn[[row for row in range(site.hidden) if row not in kept]] = 0
                rows.copy_(drawn)
                if isinstance(layer.bias, Tensor):
                    layer.bias[first : first + site.hidden] = 0


@dataclass
class _Run:
    """Runs a model, and copies of it, with the same inputs of each attention.

    These are drawn at random: on an example the tokens may be all alike, so that no scale of the softmax matters.
    """

    example_inputs: ExampleInputs
    attentions: Sequence[Pair]

    def __post_init__(self) -> None:
        self._inputs: dict[str, Tensor] = {}  # by producer
        self._producers = {name for pair in self.attentions for site in pair for name in site.producers}

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
