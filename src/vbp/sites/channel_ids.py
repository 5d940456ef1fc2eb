"""Ids of channels: which layer each belongs to, which go together, and how each is used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

# `layer`: rows of a linear layer that makes the channels; `inner`: a norm or depthwise convolution that they pass;
# `parameter`: a bare parameter with one element a channel.
OwnerKind = Literal["layer", "inner", "parameter"]


@dataclass(frozen=True)
class Owner:
    """Something with channels of its own; `first` is the id of its channel 0."""

    kind: OwnerKind
    name: str
    first: int
    channels: int


@dataclass
class Channels:
    """The id of every channel, and what the trace shows of it.

    Channels that are combined one to one (a gate with its value, a channel with its norm's weight) become one class.
    """

    owners: list[Owner] = field(default_factory=list)
    activated: set[int] = field(default_factory=set)
    mixed: set[int] = field(default_factory=set)  # normalised together with others: pruning is inexact
    bound: set[int] = field(default_factory=set)  # pass what must have these very channels, no mixtures of them
    leaks: dict[int, str] = field(default_factory=dict)  # used in a way that pruning would break
    readers: dict[int, set[str]] = field(default_factory=dict)
    _parent: list[int] = field(default_factory=list)
    _first: dict[tuple[OwnerKind, str, int], int] = field(default_factory=dict)

    def add(self, kind: OwnerKind, name: str, channels: int) -> Int[Tensor, "channels"]:
        """Add an owner unless it is known, and return the ids of its channels."""
        first = self._first.setdefault((kind, name, channels), len(self._parent))
        if first == len(self._parent):
            self.owners.append(Owner(kind, name, first, channels))
            self._parent.extend(range(first, first + channels))
        return torch.arange(first, first + channels, dtype=torch.int32)

    def owner_of(self, identity: int) -> Owner:
        """Return the owner of a channel."""
        return self.owners[bisect_right(self.owners, identity, key=lambda owner: owner.first) - 1]

    def root(self, identity: int) -> int:
        """Return the representative of a channel's class."""
        while self._parent[identity] != identity:
            self._parent[identity] = self._parent[self._parent[identity]]
            identity = self._parent[identity]
        return identity

    def couple(self, left: Tensor, right: Tensor) -> None:
        """Put each channel on the left into one class with the channel at the same place on the right."""
        pairs = torch.stack(torch.broadcast_tensors(distinct(left), distinct(right))).reshape(2, -1)  # type: ignore[no-untyped-call]
        for one, other in torch.unique(pairs, dim=1).T.tolist():
            left_root, right_root = self.root(one), self.root(other)
            self._parent[max(left_root, right_root)] = min(left_root, right_root)

    def classes(self) -> dict[int, list[int]]:
        """Return the channels of each class, by its representative."""
        members: dict[int, list[int]] = {}
        for identity in range(len(self._parent)):
            members.setdefault(self.root(identity), []).append(identity)
        return members

    def leak(self, identities: Iterable[int], reason: str) -> None:
        """Record that channels are used in a way that pruning would break."""
        for identity in identities:
            self.leaks.setdefault(identity, reason)


def compact(ids: Tensor) -> Tensor:
    """Return the same ids with stride 0 along every dimension where the channel stays the same.

    Positions are many and channels few: what follows looks at one position alone.
    """
    shape = ids.shape
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if ids.stride(dim) == 0 or bool((ids == first).all()):
                ids = first
    return ids.expand(shape)


def distinct(ids: Tensor) -> Tensor:
    """Return compact ids with one position only along the dimensions where the channel stays the same."""
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids


def present(ids: Tensor) -> list[int]:
    """Return the channels that occur in compact ids."""
    return [int(identity) for identity in torch.unique(distinct(ids)).tolist()]


def varying_dims(ids: Tensor) -> list[int]:
    """Return the dimensions of compact ids along which the channel changes."""
    return [dim for dim, size in enumerate(distinct(ids).shape) if size > 1]


def respread(ids: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return ids for a tensor whose positions changed in number but whose channels did not; None if they did."""
    if len(shape) != ids.ndim or any(shape[dim] != ids.shape[dim] for dim in varying_dims(ids)):
        return None
    return distinct(ids).expand(shape)


def columns(ids: Tensor, dim: int) -> Tensor | None:
    """Return the channel at each index of a dimension; None unless it is the same at every position."""
    if not set(varying_dims(ids)) <= {dim % ids.ndim}:
        return None
    return distinct(ids).flatten().expand(ids.shape[dim])
