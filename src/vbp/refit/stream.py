"""Bring the residual stream of a pruned model closer to the dense model's, at a few depths.

A site's own refit makes up for that site's channels, from what the dense model reads there. What it leaves adds up
along the residual stream, and the layers behind read it. So at a few depths one MLP gets a second task: from what it
reads in the pruned model, it returns what the stream after it lacks as well,

    y = what it returns + (stream of the dense model - stream of the pruned model),

by one step of `vbp.method.gauss_newton` at random positions of all images, strongly regularised, without labels and
without a backward pass. Where the hidden layer is not a plain one, the consumer alone takes part. The depths come one
after the other, since each changes what those behind it read.

Few images say little of so many coefficients. So other images decide: if the predictions on them do not come closer
to the dense model's, half of the step is tried, which takes a quarter of its noise, and if that does not help either,
the model stays as it is. Half is no rival of a whole step that helps: the images that decide may have been among
those of the statistics, and then they favour what changes little.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.gauss_newton import MLPSample
from vbp.method.sampling import RandomProbes
from vbp.pruning.compensate import copied_weights, put_weights_, restored_unless_kept, weights_between
from vbp.pruning.divergence import DenseReference
from vbp.refit.producers import add_step_, step_of
from vbp.runtime.forward import call_values, evaluation_mode, hooked
from vbp.runtime.log_file import told_if_slow
from vbp.runtime.precision import in_float32
from vbp.runtime.session import ALONE, Session
from vbp.sites.branches import has_layer
from vbp.sites.layers import channel_dim, first_tensor, maps_positions, rows
from vbp.sites.mlp import FoundMLP, find_mlps
from vbp.sites.residual import ResidualAdd, find_residual_adds
from vbp.sites.site import Site
from vbp.statistics.batches import ImagesFor
from vbp.statistics.mlp_samples import Positions, even_places, gather_sample
from vbp.statistics.objective import KL

_log = logging.getLogger(__name__)

_FIRST = RandomProbes()

# Where the stream is mended: after these parts of the sites that write into it.
DEPTHS = (0.25, 0.5, 0.75)

# Shares of the step, the first of which that helps is taken.
_SHARES = (1.0, 0.5)

# Ridge and damping, times the number of images: more of them can tell more coefficients.
PENALTY_TIMES_IMAGES = 1_000.0


@dataclass(frozen=True)
class StreamRefit:
    """Tell what refitting the stream to so many images did: the error of the objective on other images.

    `sites` are those whose layers changed, by `share` of the step that was found; none if the predictions did not
    come closer. `judged` counts the other images.
    """

    sites: tuple[str, ...]
    images: int
    judged: int
    before: float
    after: float
    measure: str = KL
    share: float = 1.0

    def sentence(self) -> str:
        """Return in words what became of the model."""
        if not self.sites:
            return f"the residual stream stays as it is: no refit to {self.images} images helped"
        step = "" if self.share == 1 else f", {self.share:.0%} of the step"
        return (
            f"the residual stream is refitted to {self.images} images at {', '.join(self.sites)}{step}: "
            f"{self.measure} {self.before:.4f} -> {self.after:.4f} (on {self.judged} others)"
        )


class DenseStream:
    """The dense model's residual stream at the sampled positions of images, in the memory of the host.

    The dense model runs over a batch once, for all depths and all pruned models that are brought to it.
    """

    def __init__(
        self,
        dense: nn.Module,
        sites: Sequence[Site],
        example: Tensor,
        batches: Iterable[Any],
        *,
        probes: RandomProbes = _FIRST,
        session: Session = ALONE,
    ) -> None:
        """Find where the stream is; batches can be gone through several times, `probes` are those of their images.

        Raises:
            InputError: No layer that reads single positions writes into a stream.
        """
        self.adds = residual_adds(dense, example, sites)
        self.plain = {mlp.site: mlp for mlp in find_mlps(dense, example, sites)}
        self.probes, self.session = probes, session
        self._dense, self._batches = dense, ImagesFor(dense, batches)
        self._sampled: dict[tuple[int, str], Tensor] = {}

    def batches(
        self, add: ResidualAdd, others: Sequence[ResidualAdd]
    ) -> Iterator[tuple[Tensor, Float[Tensor, "images positions channels"]]]:
        """Return each batch of images, and the stream after an add at the sampled positions.

        Where a batch has to go through the dense model for it, what `others` need is noted as well.
        """
        first = 0
        for number, pixels in enumerate(self._batches):
            known = self._sampled.get((number, add.module))
            # A file that could not be read the first time may be readable now.
            if known is None or len(known) != len(pixels):
                self._run(number, {each.module: each.dim for each in (add, *others)}, pixels, first)
            yield pixels, self._sampled[number, add.module]
            first += len(pixels)

    def _run(self, number: int, dims: Mapping[str, int], pixels: Tensor, first: int) -> None:
        left = dict(dims)

        def sample(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            stream = first_tensor(output)
            assert stream is not None
            if (dim := left.pop(name, None)) is not None:
                values = in_float32(rows(stream, dim, len(pixels)))
                places, _ = even_places(values, self.probes, first)
                self._sampled[number, name] = values.take_along_dim(places[..., None], 1).cpu()
            if not left:
                raise _ReachedError

        after = [(self._dense.get_submodule(name), partial(sample, name)) for name in dims]
        with hooked(after), self.session.precision.autocast(), suppress(_ReachedError):
            self._dense(pixels)
        assert not left, f"{', '.join(left)} did not run"


def refit_stream_(
    pruned: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    judge: DenseReference,
    *,
    probes: RandomProbes = _FIRST,
) -> StreamRefit:
    """Bring the pruned model's residual stream closer to the dense model's, if that helps on other images.

    Same result on all processes of `judge`, which holds the dense model and its predictions for the other images; all
    must call it. Batches can be gone through several times; none is allowed where another process has some. `probes`
    are the random numbers of this process's images. Up to three MLPs change.

    Raises:
        InputError: There is no image, no residual stream, or what is read is not finite.
    """
    stream = DenseStream(judge.model, sites, judge.example(), batches, probes=probes, session=judge.session)
    return refit_to_stream_(pruned, stream, judge)


@told_if_slow(_log, "refitting the residual stream")
def refit_to_stream_(pruned: nn.Module, stream: DenseStream, judge: DenseReference) -> StreamRefit:
    """Refit as `refit_stream_` does, to a stream that may have served other pruned models."""
    every = [add for add in stream.adds if has_layer(pruned, add.site.consumer)]
    depths = dict.fromkeys(int(len(every) * depth) for depth in DEPTHS) if every else ()
    adds = [every[place] for place in depths]
    work = _Work(pruned, stream, adds)
    before = judge.divergence(pruned)
    layers = {name for add in adds for name in (*add.site.producers, add.site.consumer)}
    measure = judge.objective.measure
    with restored_unless_kept(pruned, layers) as keep:
        start = copied_weights(pruned, layers)
        with evaluation_mode(judge.model), evaluation_mode(pruned), torch.no_grad():
            images, changed = work.refit_()
        end = copied_weights(pruned, layers)
        for share in _SHARES if changed else ():
            put_weights_(pruned, weights_between(start, end, share))
            after = judge.divergence(pruned)
            if after < before:
                keep()
                return StreamRefit(changed, images, judge.images, before, after, measure, share)
    return StreamRefit((), images, judge.images, before, before, measure)


def residual_adds(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> tuple[ResidualAdd, ...]:
    """Return where layers that read single positions write into a residual stream; raise InputError if none does."""
    found = find_residual_adds(model, example, sites)
    adds = tuple(add for add in found if maps_positions(model.get_submodule(add.site.consumer)))
    if not adds:
        raise InputError(
            f"the refit of the residual stream needs an MLP whose output is added to a stream, got "
            f"{type(model).__name__}, where none is; leave the stream as it is"
        )
    return adds


@dataclass(frozen=True)
class _Work:
    """Hold the pruned model, the stream that it is brought to, and the depths."""

    pruned: nn.Module
    stream: DenseStream
    adds: Sequence[ResidualAdd]

    def refit_(self) -> tuple[int, tuple[str, ...]]:
        """Refit at one depth after the other; return the images of all processes, and the sites that changed."""
        images, changed = 0, []
        for add in self.adds:
            mlp = self.stream.plain.get(add.site)
            sample, images = self.sample(add, mlp)
            penalty = PENALTY_TIMES_IMAGES / images
            activation = None if mlp is None else mlp.activation
            # Another machine's sums could differ by a bit: all take what the first process found.
            step = step_of(self.pruned, add.site, activation, sample, ridge=penalty, damping=penalty)
            step = self.stream.session.processes.all_gather(step)[0]
            if step.better:
                add_step_(self.pruned, add.site, step)
                changed.append(add.site.name)
        return images, tuple(changed)

    def sample(self, add: ResidualAdd, mlp: FoundMLP | None) -> tuple[MLPSample, int]:
        """Run the pruned model as far as the add; return the sample, and the images of all processes."""
        parts, images = list[Positions](), 0
        reader = add.site.consumer if mlp is None else add.site.producers[0]
        processes = self.stream.session.processes
        # Squares of the stream count, not of what the consumer returns.
        metric = add.gain.square().diag()
        gain = torch.where(add.gain == 0, torch.inf, add.gain)
        for pixels, wanted in self.stream.batches(add, self.adds):
            read, returned, stream = self._run(add, reader, pixels)
            places, weights = even_places(read, self.stream.probes, images)
            read, returned, stream = (one.take_along_dim(places[..., None], 1) for one in (read, returned, stream))
            target = returned + (wanted.to(stream) - stream) / gain.to(returned)
            parts.append(Positions.of(self.stream.probes, images, read, target, weights))
            images += len(pixels)
        total = sum(processes.all_gather(images))
        if not total:
            raise InputError("the refit of the residual stream needs at least one image, got none on any process")
        return gather_sample(add.site.name, parts, metric, processes), total

    def _run(
        self, add: ResidualAdd, reader: str, pixels: Tensor
    ) -> tuple[Tensor, Tensor, Float[Tensor, "images positions out"]]:
        """Return what the reader reads, what the consumer returns, and the stream after it; then stop."""
        seen: dict[str, Tensor] = {}

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["read"] = rows(call_values(args, kwargs)[0], channel_dim(module), len(pixels))

        def given(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen["given"] = rows(output, channel_dim(module), len(pixels)).clone()  # some models add to it in place

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            stream = first_tensor(output)
            assert stream is not None
            seen["stream"] = rows(stream, add.dim, len(pixels))
            raise _ReachedError

        layer = self.pruned.get_submodule
        after = [(layer(add.site.consumer), given), (layer(add.module), stop)]
        try:
            with hooked(after, before=[(layer(reader), read)]), self.stream.session.precision.autocast():
                self.pruned(pixels)
        except _ReachedError:
            return in_float32(seen["read"]), in_float32(seen["given"]), in_float32(seen["stream"])
        raise AssertionError(f"{add.module} did not run")


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""
