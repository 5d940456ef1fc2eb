"""Bring the residual stream of a pruned model back to where the dense model's runs, at a few depths.

A site's own refit makes up for that site's channels, from what the dense model reads there. What it leaves adds up
along the residual stream, and the layers behind read it. So at a few depths one consumer gets a second task: from
what it reads in the pruned model, it predicts what the stream after it lacks,

    d = stream of the dense model - stream of the pruned model,     minimise  mean |d - E [h;1]|^2 + ridge,

by least squares in closed form, without labels and without a backward pass, and E is added to its weight and bias.
The squares are those of single positions and those of each image's mean: errors that all positions of an image share
are few among the first, but are what the answer reads. The depths come one after the other, since each changes what
those behind it read.

Few images say little of so many coefficients. So other images have the last word: if the answers there do not come
closer to the dense model's, the model stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vbp.consumers import add_to_bias_
from vbp.distributed import Processes
from vbp.divergence import HeldBack
from vbp.errors import InputError
from vbp.joins import Join, find_joins, first_tensor, rows
from vbp.modes import evaluation_mode
from vbp.precision import Precision, in_float32
from vbp.sites import Site
from vbp.tracing import channel_dim

_OFF, _ALONE = Precision(), Processes()
# Where the stream is mended: after these parts of the sites that write into it.
_DEPTHS = (0.25, 0.5, 0.75)
# What the means of images count for; single positions are the rest.
_MEANS_SHARE = 0.25
# Penalty, in variances of what is read, times the number of images: more of them can tell more coefficients.
_RIDGE_TIMES_IMAGES = 1_500.0


@dataclass(frozen=True)
class StreamRefit:
    """What bringing the stream back did, on images that it was not fitted to.

    Attributes:
        sites: Whose consumers changed; none if the answers did not come closer.
        images: Images fitted to, of all processes.
        judged: Other images, by which the answers were compared.
        before: Mean KL(dense || pruned) on these without it, in nats.
        after: The same with it.
    """

    sites: tuple[str, ...]
    images: int
    judged: int
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON data."""
        return asdict(self) | {"sites": list(self.sites)}

    def sentence(self) -> str:
        """Say in words what became of the model."""
        if not self.sites:
            return f"the residual stream stays as it is: no refit to {self.images} images helped"
        return (
            f"the residual stream is refitted to {self.images} images at {', '.join(self.sites)}: mean KL of the "
            f"answers from the dense model's {self.before:.4f} -> {self.after:.4f} (on {self.judged} others)"
        )


def refit_stream_(
    pruned: nn.Module,
    dense: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Tensor],
    judge: HeldBack,
    *,
    precision: Precision = _OFF,
    processes: Processes = _ALONE,
) -> StreamRefit:
    """Let the pruned model's residual stream run where the dense model's does, as far as other images bear it out.

    Same result on all processes, which must all call it.

    Args:
        pruned: The model, pruned; up to three consumers change.
        dense: The dense model, on the same device; left as it was.
        sites: Those that were pruned, from `find_sites` on the dense model.
        batches: Calibration images, without labels, which can be gone through several times; none is allowed where
            another process has some.
        judge: Other images, and the dense model's answers.
        precision: Of all forward passes.
        processes: Whose images count together.

    Raises:
        InputError: There is no image, no residual stream, or what is read is not finite.
    """
    example = judge.example()
    joins = _at_depths(_found(dense, example, sites))
    before = judge.divergence(pruned)
    with _restored_unless_kept(pruned, joins) as keep:
        images = 0
        with evaluation_mode(dense), evaluation_mode(pruned), torch.no_grad():
            for join in joins:
                sums = _Sums.of(pruned, dense, join, example, batches, precision, processes)
                images = sums.images
                # Sums in another order could differ by a bit: all take what the first process found.
                _add_(pruned, join, sums, processes.gather(sums.solve(join.site.name))[0])
        after = judge.divergence(pruned)
        if not after < before:
            return StreamRefit((), images, judge.images, before, before)
        keep()
    return StreamRefit(tuple(join.site.name for join in joins), images, judge.images, before, after)


def check_stream(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> None:
    """Refuse a model in which no MLP writes into a residual stream.

    Raises:
        InputError: It is one.
    """
    _found(model, example, sites)


def _found(model: nn.Module, example: Tensor, sites: Sequence[Site]) -> tuple[Join, ...]:
    joins = find_joins(model, example, sites)
    if not joins:
        raise InputError(
            f"the refit of the residual stream needs an MLP whose output is added to a stream, got "
            f"{type(model).__name__}, where none is; leave the stream as it is"
        )
    return joins


def _at_depths(joins: Sequence[Join]) -> tuple[Join, ...]:
    places = dict.fromkeys(int(len(joins) * depth) for depth in _DEPTHS)
    return tuple(joins[place] for place in places)


@contextmanager
def _restored_unless_kept(model: nn.Module, joins: Sequence[Join]) -> Iterator[Callable[[], None]]:
    """Give the consumers their weights back in the end, whatever happened, unless what is given was called."""
    saved = {
        (join.site.consumer, name): copy.deepcopy(getattr(model.get_submodule(join.site.consumer), name))
        for join in joins
        for name in ("weight", "bias")
    }
    try:
        yield saved.clear
    finally:
        for (layer, name), parameter in saved.items():
            model.get_submodule(layer).register_parameter(name, parameter)


@dataclass(frozen=True)
class _Sums:
    """Sums over the images of all processes; the hidden channels count from `pivot`, and a last one is always 1.

    Attributes:
        images: Images.
        pivot: Near the means of the hidden channels, float64.
        squares: Of what is read: over single positions, and over the means of images; "hidden+1 hidden+1", float64.
        products: With what the stream lacks, likewise; "hidden+1 out", float64.
    """

    images: int
    pivot: Float[Tensor, "hidden"]
    squares: tuple[Tensor, Tensor]
    products: tuple[Tensor, Tensor]

    @staticmethod
    def of(
        pruned: nn.Module,
        dense: nn.Module,
        join: Join,
        example: Tensor,
        batches: Iterable[Tensor],
        precision: Precision,
        processes: Processes,
    ) -> _Sums:
        """Run both models as far as the join on all images."""
        read, _ = _run_to(pruned, join, example, precision)
        pivot = processes.gather(read.double().mean((0, 1)).cpu())[0].to(read.device)
        squares = tuple(pivot.new_zeros(len(pivot) + 1, len(pivot) + 1) for _ in range(2))
        products = tuple(pivot.new_zeros(len(pivot) + 1, len(join.gain)) for _ in range(2))
        images = pivot.new_zeros(1)
        for batch in batches:
            pixels = batch.to(pivot.device, non_blocking=True)
            _, wanted = _run_to(dense, join, pixels, precision)
            read, found = _run_to(pruned, join, pixels, precision)
            x, y = F.pad(read - pivot.to(read.dtype), (0, 1), value=1.0), wanted - found
            for place, (left, right) in enumerate(((x.flatten(0, 1), y.flatten(0, 1)), (x.mean(1), y.mean(1)))):
                squares[place].add_(left.T @ left)
                products[place].add_(left.T @ right)
            images += len(batch)
        for one in (images, *squares, *products):
            processes.sum_(one)
        if not images:
            raise InputError("the refit of the residual stream needs at least one image, got none on any process")
        return _Sums(int(images), pivot, (squares[0], squares[1]), (products[0], products[1]))

    @property
    def mean(self) -> Float[Tensor, "hidden"]:
        """Mean of each channel over all positions, from the pivot."""
        single = self.squares[0]
        return single[:-1, -1] / single[-1, -1]

    def solve(self, name: str) -> Float[Tensor, "hidden_and_one out"]:
        """Give the coefficients of the channels, each counted from its mean, on the CPU.

        Raises:
            InputError: What was read is not finite.
        """
        if not all(bool(one.isfinite().all()) for one in (*self.squares, *self.products)):
            raise InputError(
                f"what the consumer of site {name} reads and the stream after it must be finite, got NaN or "
                "infinity; prune less, or in float32"
            )
        shift = torch.eye(len(self.mean) + 1, dtype=self.pivot.dtype, device=self.pivot.device)
        shift[:-1, -1] = -self.mean
        metric, target = torch.zeros_like(self.squares[0]), torch.zeros_like(self.products[0])
        shares = (1 - _MEANS_SHARE, _MEANS_SHARE)
        for share, square, product in zip(shares, self.squares, self.products, strict=True):
            about = shift @ square @ shift.T
            scale = share / about.diagonal()[:-1].sum().clamp_min(torch.finfo(about.dtype).tiny)
            metric += scale * about
            target += scale * (shift @ product)
        penalty = _RIDGE_TIMES_IMAGES / self.images * metric.diagonal()
        penalty[-1] /= 10  # one number an output, which every position tells
        # A channel that never changes gets nothing.
        penalty = torch.where(penalty > 0, penalty, torch.ones_like(penalty))
        found: Tensor = torch.linalg.solve(metric + penalty.diag(), target)
        return found.cpu()


def _add_(model: nn.Module, join: Join, sums: _Sums, coefficients: Float[Tensor, "hidden_and_one out"]) -> None:
    """Add to the consumer what brings the stream nearer: as much less as the stream gains more from it."""
    layer = model.get_submodule(join.site.consumer)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    found = torch.where(join.gain == 0, 0.0, coefficients / join.gain).T.to(weight.device)
    change, centre = found[:, :-1], sums.pivot + sums.mean
    weight.copy_((weight.double() + change.reshape(weight.shape)).to(weight.dtype))
    add_to_bias_(layer, found[:, -1] - change @ centre)


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""


def _run_to(
    model: nn.Module, join: Join, pixels: Tensor, precision: Precision
) -> tuple[Float[Tensor, "images positions hidden"], Float[Tensor, "images positions out"]]:
    """Give what the consumer reads, and the stream after it; no layer behind it runs."""
    consumer = model.get_submodule(join.site.consumer)
    seen: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(rows(args[0], channel_dim(consumer), len(pixels)))

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream = first_tensor(output)
        assert stream is not None
        seen.append(rows(stream, join.dim, len(pixels)))
        raise _ReachedError

    handles = [
        consumer.register_forward_pre_hook(read),
        model.get_submodule(join.module).register_forward_hook(stop),
    ]
    try:
        with precision.autocast():
            model(pixels)
    except _ReachedError:
        hidden, stream = seen
        return in_float32(hidden), in_float32(stream)
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"{join.module} did not run")
