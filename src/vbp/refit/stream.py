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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from vbp.runtime.session import Session
from vbp.sites.branches import has_layer
from vbp.sites.layers import channel_dim, first_tensor, maps_positions, rows
from vbp.sites.mlp import FoundMLP, find_mlps
from vbp.sites.residual import ResidualAdd, find_residual_adds
from vbp.sites.site import Site
from vbp.statistics.batches import ImagesFor
from vbp.statistics.mlp_samples import gather_sample, sample_positions
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


@told_if_slow(_log, "refitting the residual stream")
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
    dense, example = judge.model, judge.example()
    every = [add for add in residual_adds(dense, example, sites) if has_layer(pruned, add.site.consumer)]
    depths = dict.fromkeys(int(len(every) * depth) for depth in DEPTHS) if every else ()
    adds = [every[place] for place in depths]
    plain = {mlp.site: mlp for mlp in find_mlps(dense, example, sites)}
    work = _Work(pruned, dense, adds, plain, probes, judge.session)
    before = judge.divergence(pruned)
    layers = {name for add in adds for name in (*add.site.producers, add.site.consumer)}
    measure = judge.objective.measure
    with restored_unless_kept(pruned, layers) as keep:
        start = copied_weights(pruned, layers)
        images, changed = work.refit_(ImagesFor(dense, batches))
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
    """Hold both models, the depths, and how the models are run."""

    pruned: nn.Module
    dense: nn.Module
    adds: Sequence[ResidualAdd]
    plain: Mapping[Site, FoundMLP]
    probes: RandomProbes
    session: Session

    def refit_(self, batches: Iterable[Tensor]) -> tuple[int, tuple[str, ...]]:
        """Refit at one depth after the other; return the images of all processes, and the sites that changed."""
        images, changed = 0, []
        with evaluation_mode(self.dense), evaluation_mode(self.pruned), torch.no_grad():
            for add in self.adds:
                mlp = self.plain.get(add.site)
                sample, images = self.sample(add, mlp, batches)
                penalty = PENALTY_TIMES_IMAGES / images
                activation = None if mlp is None else mlp.activation
                # Another machine's sums could differ by a bit: all take what the first process found.
                step = step_of(self.pruned, add.site, activation, sample, ridge=penalty, damping=penalty)
                step = self.session.processes.all_gather(step)[0]
                if step.better:
                    add_step_(self.pruned, add.site, step)
                    changed.append(add.site.name)
        return images, tuple(changed)

    def sample(self, add: ResidualAdd, mlp: FoundMLP | None, batches: Iterable[Tensor]) -> tuple[MLPSample, int]:
        """Run both models as far as the add on all images; return the sample, and the images of all processes."""
        parts, images = [], 0
        reader = add.site.consumer if mlp is None else add.site.producers[0]
        # Squares of the stream count, not of what the consumer returns.
        metric = add.gain.square().diag()
        gain = torch.where(add.gain == 0, torch.inf, add.gain)
        for pixels in batches:
            _, _, wanted = self._run(self.dense, add, reader, pixels)
            read, returned, stream = self._run(self.pruned, add, reader, pixels)
            target = returned + (wanted - stream) / gain.to(returned)
            parts.append(sample_positions(read, target, torch.ones_like(read[..., 0]), self.probes, images))
            images += len(pixels)
        total = sum(self.session.processes.all_gather(images))
        if not total:
            raise InputError("the refit of the residual stream needs at least one image, got none on any process")
        return gather_sample(add.site.name, parts, metric, self.session.processes), total

    def _run(
        self, model: nn.Module, add: ResidualAdd, reader: str, pixels: Tensor
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

        after = [(model.get_submodule(add.site.consumer), given), (model.get_submodule(add.module), stop)]
        try:
            with hooked(after, before=[(model.get_submodule(reader), read)]), self.session.precision.autocast():
                model(pixels)
        except _ReachedError:
            return in_float32(seen["read"]), in_float32(seen["given"]), in_float32(seen["stream"])
        raise AssertionError(f"{add.module} did not run")


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""
