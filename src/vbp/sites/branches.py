"""Branches: modules around all layers of a site that return what its consumer returns, and can be a constant instead.

With all channels held at their means the consumer returns a constant. Where the module around the layers returns just
that, as `attn` and `mlp` in a block of a ViT, it can be replaced as a whole: none of its layers has to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.runtime.forward import ExampleInputs, call_values, evaluation_mode, hooked, run_model
from vbp.sites.layers import channel_dim
from vbp.sites.site import Site, blocks_of


class ConstantBranch(nn.Module):
    """Return the same channels at every position, in the shape of the first argument.

    Args:
        value: The channels.
        dim: Their dimension, counted from the last.
    """

    def __init__(self, value: Float[Tensor, "channels"], dim: int) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.dim = dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the constant."""
        like: Tensor = call_values(args, kwargs)[0]
        shape = [1] * like.ndim
        shape[self.dim] = len(self.value)
        value = self.value.view(shape).to(like.dtype)
        if self.training and torch.is_grad_enabled():
            # So that the layers before it have gradients, of zero: several processes wait for all of them.
            return value + 0 * like
        return value.expand_as(like)


def home_of(model: nn.Module, unit: Sequence[Site]) -> str:
    """Return the smallest module that is called and holds all layers of a unit; empty for the model itself."""
    names = [name for site in unit for name in (*site.layers, *site.inner) if name]
    steps = zip(*(name.split(".")[:-1] for name in names), strict=False)
    path = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, steps)]
    # A list of modules has no forward pass.
    while path and type(model.get_submodule(".".join(path))).forward is nn.Module.forward:
        path.pop()
    return ".".join(path)


def with_branches(model: nn.Module, sites: Sequence[Site], example_inputs: ExampleInputs) -> list[Site]:
    """Return the sites with the names of their branches, where one returns what the consumer returns."""
    layers = {block: {name for site in block for name in site.layers} for block in blocks_of(sites)}
    homes = {}
    for block, own in layers.items():
        home = home_of(model, block)
        inside = {name for names in layers.values() for name in names if name.startswith(f"{home}.")}
        if block[0].consumer and not block[0].separate and inside <= own:
            homes[block] = home
    seen: dict[str, list[tuple[Any, Any]]] = {}

    def record(name: str, module: nn.Module, values: tuple[Any, ...], output: Any) -> None:
        first = values[0].shape if values and isinstance(values[0], Tensor) else None
        seen.setdefault(name, []).append((first, output.clone() if isinstance(output, Tensor) else None))

    names = {name for unit, home in homes.items() for name in (home, unit[0].consumer) if name}
    with (
        hooked((model.get_submodule(name), partial(record, name)) for name in names),
        evaluation_mode(model),
        torch.no_grad(),
    ):
        run_model(model, example_inputs)
    branches = {}
    for unit, home in homes.items():
        around, read = seen.get(home, []), seen.get(unit[0].consumer, [])
        if len(around) == len(read) == 1 and _returns(*around[0], read[0][1]):
            branches.update(dict.fromkeys(unit, home))
    return [replace(site, branch=branches[site]) if site in branches else site for site in sites]


def replace_branches_(model: nn.Module, sites: Sequence[Site]) -> None:
    """Put a constant in the place of the branches of MLPs and attentions: the bias of their consumers."""
    for site in sites:
        if site.consumer:
            consumer = model.get_submodule(site.consumer)
            bias = consumer.bias
            learns = any(parameter.requires_grad for parameter in consumer.parameters())
            assert isinstance(consumer.weight, Tensor)
            value = consumer.weight.new_zeros(len(consumer.weight)) if bias is None else bias
            assert isinstance(value, Tensor)
            constant = ConstantBranch(value.detach().clone(), channel_dim(consumer))
            constant.requires_grad_(learns).train(consumer.training)
            model.set_submodule(site.branch, constant)


def has_layer(model: nn.Module, name: str) -> bool:
    """Return whether a model still has a layer, which a removed branch took with it."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _returns(first: torch.Size | None, output: Tensor | None, read: Tensor | None) -> bool:
    return (
        output is not None
        and read is not None
        and output.shape == first
        and output.numel() == read.numel()
        and torch.equal(output.flatten(), read.flatten())
    )
