"""Find the sites of a model: the hidden channels that can be removed, read off one trace."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import nn

from vbp.errors import InputError
from vbp.runtime.forward import ExampleInputs
from vbp.sites.attention_trial import AttentionSites, try_attentions
from vbp.sites.branches import with_branches
from vbp.sites.channel_ids import Owner
from vbp.sites.layers import (
    groups_of,
    inner_channels,
    input_channels,
    mixes_channels,
    output_channels,
    unusual_layer,
)
from vbp.sites.propagation import PRODUCTS, Attention, Trace
from vbp.sites.site import Site, SiteKind
from vbp.sites.tracer import trace_model
from vbp.sites.trial import working_sites

_log = logging.getLogger(__name__)

# Layers that read channels, each with the first column of these.
_Readers = list[tuple[str, int]]


def find_sites(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    attention: bool = False,
    convolutions: bool = False,
) -> tuple[Site, ...]:
    """Find the hidden channels between pairs of linear or 1x1-convolution layers, in the order in which they run.

    The channels are followed through a forward pass in evaluation mode and one in training mode, so names and nesting
    of the modules do not matter. Between the two layers there may be activations, gates, norms, depthwise
    convolutions, squeeze-and-excitation and changes of shape; several layers may read the channels, alone or within a
    concatenation. What is used in any other way, or is made or read by a layer that is more than its `weight` and
    `bias`, is left out, with a log line saying why; so is a site without half of whose channels the model does not
    run, as a trial on a copy shows.

    Args:
        model: Any image classifier.
        example_inputs: An input of the model, "1 channels height width", on the model's device; or all its arguments,
            in their order (a tuple) or by name (a dict). Give noise or a real image: a blank one hides differences.
        attention: Also find the value, and the query and key, channels inside attention.
        convolutions: Also look between convolutions with kernels of any size, and in groups, each of which then keeps
            as many channels. Where such a kernel meets zero padding
            the mean shift is inexact at the border: there the dense model has 0 in the place of the mean.

    Raises:
        InputError: The model does not run, has no such pair, or `attention` is asked for and none can be pruned.

    Example:
        >>> [site.name for site in vbp.find_sites(model, example)]
        ['blocks.0.mlp.fc1', 'blocks.1.mlp.fc1']
    """
    finder = _Finder(model, trace_model(model, example_inputs, convolutions=convolutions))
    sites = list(finder.mlps())
    others = len(finder.rejected)
    if attention:
        sites += [site for call in finder.trace.attentions for site in finder.attention(call)]
        finder.log_unfollowed_attention()
    sites = finder.tried(finder.whole(sites), example_inputs)
    sites = finder.whole(finder.working(sites, example_inputs))
    sites = with_branches(model, sites, example_inputs)
    if attention and all(site.kind == "mlp" for site in sites):
        raise InputError(
            f"no prunable attention in {type(model).__name__}: looked for query, key and value layers whose "
            "heads reach softmax(q k) v and one projection unchanged (no rotary embedding, no normalised "
            "queries, no weights passed to a function by hand: vbp.split_attention_(model) gives those of torch, "
            "timm and torchvision layers of their own); leave attention (--bottleneck) out"
            f"{_reasons(finder.rejected[others:][-3:])}"
        )
    if not convolutions and len(larger := _larger_kernels(model)) > len(sites) > 0:
        _log.info(
            "%d convolutions with larger kernels or groups (%s first) are not looked at; --convolutions does, in "
            "Python find_sites(..., convolutions=True)", len(larger), larger[0],
        )  # fmt: skip
    unusual = finder.unusual or [unusual_layer(*one) for one in finder.trace.unusual.items()]
    if not sites and unusual:
        raise InputError(f"no prunable site in {type(model).__name__}: {'; '.join(unusual[:3])}")
    if not sites:
        layers, remedy = "Linear or 1x1 Conv2d layer", "give a model that has such layers"
        if convolutions:
            layers = "Linear or Conv2d layer, of a kernel of any size,"
        elif _larger_kernels(model):
            remedy += (
                ", or look between larger kernels too, as in a ResNet: --convolutions, in Python "
                "find_sites(..., convolutions=True)"
            )
        raise InputError(
            f"no prunable site in {type(model).__name__}: looked for a {layers} whose output passes through an "
            "activation (GELU, ReLU, SiLU, ...) and then into other such layers alone, as in the MLP of a ViT, DeiT, "
            f"Swin or ConvNeXt block; {remedy}{_reasons(finder.rejected[:3])}"
        )
    return tuple(sites)


def _larger_kernels(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if mixes_channels(module, convolutions=True) and not mixes_channels(module, convolutions=False)
    ]


def _reasons(sentences: list[str]) -> str:
    return "".join(f"; {sentence}" for sentence in sentences)


class _Finder:
    """Reads sites off a trace."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self._classes = trace.channels.classes()
        self._attentions: list[AttentionSites] = []
        self.rejected: list[str] = []  # sentences
        self.unusual: list[str] = []  # those among them that name a layer, with the remedy

    def reject(self, sentence: str) -> None:
        """Log why something is no site, and keep it for an error."""
        _log.info("%s", sentence)
        self.rejected.append(sentence)

    def mlps(self) -> Iterator[Site]:
        attended = {
            identity
            for call in self.trace.attentions
            if call.query is not None and call.value is not None
            for identity in self._members(call.value.flatten().tolist())
        }
        for ids, readers in self._runs():
            members = self._members(ids)
            if not members & self.trace.channels.activated or members & attended:
                continue
            site = self._site(ids, readers, "mlp", 1)
            if isinstance(site, Site):
                yield site
            else:
                self.reject(f"the input of {readers[-1][0]} is no site: {site}")

    def _runs(self) -> Iterator[tuple[list[int], _Readers]]:
        """Return the channels that the same layers make and read, and from which column on each of these reads them.

        What a layer reads is cut where that changes: in a concatenation every part is by itself.
        """
        channels = self.trace.channels
        known: dict[int, tuple[list[int], list[str]]] = {}

        def layers(root: int) -> tuple[list[int], list[str]]:
            if root not in known:
                group = self._classes[root]
                readers = set().union(*(channels.readers.get(member, set()) for member in group))
                known[root] = [channels.owner_of(member).first for member in group], sorted(readers)
            return known[root]

        runs: dict[tuple[int, ...], tuple[list[int], _Readers]] = {}
        for read in self.trace.reads:
            first = 0
            pieces: dict[str, list[int]] = {}
            for key, part in groupby(read.ids.tolist(), lambda identity: layers(channels.root(identity))):
                ids = list(part)
                if (before := pieces.setdefault(str(key), ids)) is ids:
                    _, readers = runs.setdefault(tuple(map(channels.root, ids)), (ids, []))
                    readers.append((read.layer, first))
                else:  # as behind a shuffle of channels
                    channels.leak([*before, *ids], f"{read.layer}, in scattered columns")
                first += len(ids)
        yield from runs.values()

    def attention(self, call: Attention) -> list[Site]:
        """Return the value site of one attention and, if they can be pruned too, that of its queries and keys."""
        channels, first = self.trace.channels, call.value if call.query is None else call.query
        assert first is not None
        label = channels.owner_of(int(first[0, 0])).name
        values = None if call.value is None else call.value.flatten().tolist()
        reads = [read.layer for read in self.trace.reads if read.ids.tolist() == values]
        if len(reads) != 1 or values is None or call.value is None:
            self.reject(f"the attention behind {label} is no site: no single layer reads its values in order")
            return []
        if call.query is None and self._members(values) & channels.activated:
            return []  # an MLP whose positions are mixed
        heads = call.value.shape[0]
        value = self._site(values, [(reads[0], 0)], "value", heads)
        pair: Site | str = "something stands between the layers of queries and keys and the softmax"
        if call.query is not None:
            pair = self._site(call.query.flatten().tolist(), [], "query_key", heads, call.implicit_scale)
        if isinstance(value, str):
            self.reject(f"the attention behind {label} is no site: {value}")
            return []
        if isinstance(pair, str):
            self.reject(f"queries and keys of the attention behind {label} stay: {pair}")
        self._attentions.append((value, pair if isinstance(pair, Site) else None))
        return [site for site in (value, pair) if isinstance(site, Site)]

    def whole(self, sites: list[Site]) -> list[Site]:
        """Return the sites without those that share a layer with rows of no site, which the model's code splits."""
        while True:
            claimed: dict[str, int] = defaultdict(int)
            for site in sites:
                for name in site.producers:
                    claimed[name] += site.hidden
            partial = {
                name for name, rows in claimed.items() if rows != output_channels(self.model.get_submodule(name))
            }
            if not partial:
                return sites
            for site in sites:
                if shared := partial & set(site.producers):
                    self.reject(
                        f"{site.name} is no site: {', '.join(sorted(shared))} also makes channels that are none"
                    )
            sites = [site for site in sites if not partial & set(site.producers)]

    def tried(self, sites: list[Site], example_inputs: ExampleInputs) -> list[Site]:
        """Return the sites with every attention as a trial shows it: with the scale that it takes, or without it."""
        attentions = [(value, pair if pair in sites else None) for value, pair in self._attentions if value in sites]
        kept = [site for site in sites if site.kind == "mlp"]
        results = try_attentions(self.model, example_inputs, attentions)
        for (value, pair), result in zip(attentions, results, strict=True):
            if isinstance(result, str):
                self.reject(f"the attention behind {(pair or value).producers[0]} is no site: {result}")
            else:
                kept += [site for site in result if site is not None]
        return kept

    def working(self, sites: list[Site], example_inputs: ExampleInputs) -> list[Site]:
        """Return the sites without the MLPs that the model's code does not allow to be narrower, as a trial shows."""
        mlps = [site for site in sites if site.kind == "mlp"]
        _, reasons = working_sites(self.model, mlps, example_inputs)
        for name, reason in reasons.items():
            self.reject(f"{name} is no site: {reason}")
        return [site for site in sites if site.kind != "mlp" or site.name not in reasons]

    def log_unfollowed_attention(self) -> None:
        """Name the layers whose channels meet others of unknown origin in an attention."""
        channels = self.trace.channels
        ends = {channels.owner_of(one).name for one, reason in channels.leaks.items() if reason in PRODUCTS}
        for name in sorted(ends):
            self.reject(
                f"the attention behind {name} is no site: not all of queries, keys and values come from layers"
            )

    def _members(self, ids: list[int]) -> set[int]:
        channels = self.trace.channels
        return {member for root in {channels.root(identity) for identity in ids} for member in self._classes[root]}

    def _site(
        self, ids: list[int], readers: _Readers, kind: SiteKind, heads: int, implicit_scale: bool = False
    ) -> Site | str:
        """Return the site of these channels, or why they are none."""
        channels = self.trace.channels
        groups = [self._classes[channels.root(identity)] for identity in ids]
        if reason := self._why_unfit(groups, [layer for layer, _ in readers]):
            return reason
        owners: list[tuple[Owner, int]] = []
        # Queries before their keys, whichever layer runs first.
        ordered = [
            sorted(group, key=lambda one: (one != identity, one)) if kind == "query_key" else sorted(group)
            for identity, group in zip(ids, groups, strict=True)
        ]
        strides = []
        for place, first in enumerate(ordered[0]):
            owner = channels.owner_of(first)
            rows = [group[place] if len(group) == len(ordered[0]) else -1 for group in ordered]
            stride = _stride(rows, heads)
            if not stride or rows[-1] >= owner.first + owner.channels:
                return f"its channels are scattered over the rows of {owner.name}"
            if owner.kind == "layer":
                strides.append(stride)
            elif stride != len(ids) // heads:
                return f"the rows of its heads do not follow each other in {owner.name}"
            owners.append((owner, first - owner.first))
        layers, inner = (
            [(owner.name, offset) for owner, offset in owners if owner.kind == what] for what in ("layer", "inner")
        )
        offsets = tuple(offset for _, offset in layers)
        if split := [owner.name for owner, _ in owners if owner.kind == "parameter" and owner.channels != len(ids)]:
            return f"{split[0]} belongs to other channels too"
        grouped = [groups_of(self.model.get_submodule(name)) for name, _ in (*layers, *readers)]
        if kind == "mlp":
            # As many channels stay in each group of every layer.
            heads = math.lcm(*grouped)
            whole = [output_channels(self.model.get_submodule(name)) for name, _ in layers]
            whole += [input_channels(self.model.get_submodule(name)) for name, _ in readers]
            if heads > 1 and (len(ids) % heads or any(width != len(ids) for width in whole)):
                return "the groups of a convolution do not divide its channels"
        members = {member for group in groups for member in group}
        # Queries and keys come from a layer each, or twice from one; a second layer of values would be a gate.
        plain = len(owners) == len(layers) == (2 if kind == "query_key" else 1)
        read = [self.model.get_submodule(name) for name, _ in readers]
        # The consumer is the last that reads them.
        order = [*readers[-1:], *readers[:-1]]
        return Site(
            tuple(name for name, _ in layers),
            order[0][0] if order else "",
            len(ids),
            kind,
            offsets if any(offsets) else (),
            tuple(name for name, _ in inner),
            tuple(owner.name for owner, _ in owners if owner.kind == "parameter"),
            heads,
            not members & channels.mixed and not any(map(_meets_zero_padding, read)),
            implicit_scale,
            kind != "mlp" and plain and not members & (channels.mixed | channels.bound),
            tuple(name for name, _ in order[1:]),
            () if all(input_channels(layer) == len(ids) for layer in read) else tuple(first for _, first in order),
            ()
            if all(inner_channels(self.model.get_submodule(name)) == len(ids) for name, _ in inner)
            else tuple(first for _, first in inner),
            strides=tuple(strides) if kind != "mlp" and any(one != len(ids) // heads for one in strides) else (),
        )

    def _why_unfit(self, groups: list[list[int]], consumers: list[str]) -> str:
        channels = self.trace.channels
        members = {member for group in groups for member in group}
        if leaks := {channels.leaks[member] for member in members if member in channels.leaks}:
            return f"its channels are also used by {', '.join(sorted(leaks))}"
        readers = set().union(*(channels.readers.get(member, set()) for member in members))
        if others := readers - {*consumers}:
            return f"its channels are also read by {', '.join(sorted(others))}"
        if len({id(group) for group in groups}) != len(groups) or len({*consumers}) != len(consumers):
            return "some of its channels are bound together"
        names = {channels.owner_of(member).name for group in groups[:1] for member in group} | {*consumers}
        if unusual := sorted(names & self.trace.unusual.keys()):
            self.unusual.append(unusual_layer(unusual[0], self.trace.unusual[unusual[0]]))
            return self.unusual[-1]
        if repeated := sorted(name for name in names if self.trace.calls.get(name, 0) > 1):
            return f"{', '.join(repeated)} runs more than once in a forward pass"
        return ""


def _stride(rows: Sequence[int], heads: int) -> int:
    """Return from which row to which each head goes on; 0 if the rows are not those of heads of one size."""
    size = len(rows) // heads
    stride = rows[size] - rows[0] if heads > 1 else size
    expected = [rows[0] + head * stride + index for head in range(heads) for index in range(size)]
    return stride if list(rows) == expected and stride >= size else 0


def _meets_zero_padding(consumer: nn.Module) -> bool:
    return (
        isinstance(consumer, nn.Conv2d)
        and consumer.kernel_size != (1, 1)
        and consumer.padding_mode == "zeros"
        and consumer.padding not in ("valid", (0, 0))
    )
