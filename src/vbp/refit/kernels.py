"""Refit the convolutions with larger kernels that read pruned channels, from the patches that they read.

A layer is refitted to what it returns in the dense model, from the kept channels as they are there: each layer by
itself, so that one forward pass of the dense model serves all (`vbp.method.patch_fit` has the equations). An eighth
of the images is held out and decides, layer by layer, whether the change is taken. Other images decide in the end: if
the predictions on them do not come closer to the dense model's, the model stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.gauss_newton import HELD_OUT_SHARE
from vbp.method.patch_fit import PatchFit, PatchMoments, fit_patches
from vbp.method.sampling import RandomProbes
from vbp.pruning.compensate import add_in_float64_, add_to_bias_, restored_unless_kept
from vbp.pruning.divergence import DenseReference
from vbp.pruning.plan import PruningPlan
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.runtime.log_file import told_if_slow
from vbp.runtime.precision import in_float32
from vbp.runtime.processes import Processes
from vbp.sites.branches import has_layer
from vbp.sites.layers import channel_dim, groups_of, input_channels, is_depthwise, output_channels, reads, rows
from vbp.sites.site import Site
from vbp.statistics.batches import ImagesFor
from vbp.statistics.images import in_pieces
from vbp.statistics.objective import KL

_log = logging.getLogger(__name__)
_FIRST = RandomProbes()

# Positions of an image; of feature maps with more, so many are drawn.
POSITIONS: Final = 64

_HELD_OUT_EVERY: Final = round(1 / HELD_OUT_SHARE)


@dataclass(frozen=True)
class KernelRefit:
    """Tell what refitting layers with larger kernels to so many images did: the error of the objective on others.

    `errors` are those of each layer's output before and after, on the held-out eighth of the images, as a share of
    its variance; `layers` are those that changed, none if the predictions did not come closer.
    """

    layers: tuple[str, ...]
    images: int
    judged: int
    errors: Mapping[str, tuple[float, float]]
    before: float
    after: float
    measure: str = KL

    def sentence(self) -> str:
        """Return in words what became of the model."""
        if not self.layers:
            return f"the layers with larger kernels stay as they are: no refit to {self.images} images helped"
        return (
            f"{len(self.layers)} of {len(self.errors)} layers with larger kernels are refitted to {self.images} "
            f"images: {self.measure} {self.before:.4f} -> {self.after:.4f} (on {self.judged} others)"
        )


def kernel_readers(model: nn.Module, sites: Iterable[Site]) -> tuple[str, ...]:
    """Return the convolutions with larger kernels that read the channels of sites, each once."""
    return tuple(
        dict.fromkeys(
            reader.layer
            for site in sites
            for reader in site.readers
            if isinstance(layer := model.get_submodule(reader.layer), nn.Conv2d)
            and layer.kernel_size != (1, 1)
            and not is_depthwise(layer)
        )
    )


def check_kernels(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise InputError if no convolution with a larger kernel reads the channels of sites."""
    if not kernel_readers(model, sites):
        raise InputError(
            f"the refit of larger kernels needs a convolution with one that reads pruned channels, got "
            f"{type(model).__name__}, where none does; leave the kernels as they are"
        )


@told_if_slow(_log, "refitting the larger kernels")
def refit_kernels_(
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    judge: DenseReference,
    *,
    probes: RandomProbes = _FIRST,
) -> KernelRefit:
    """Bring the outputs of layers with larger kernels closer to the dense model's, if that helps on other images.

    Same result on all processes of `judge`, which holds the dense model and its predictions for the other images; all
    must call it. `probes` are the random numbers of this process's images.

    Raises:
        InputError: There is no image, or what is read is not finite.
    """
    work = _Work(pruned, plan, judge, probes)
    layers = work.layers()
    before = judge.divergence(pruned)
    images, fits = work.fits(layers, batches) if layers else (0, {})
    changed = tuple(name for name, fit in fits.items() if any(part.change is not None for part in fit))
    errors = {
        name: (_mean(part.before for part in fit), _mean(part.after for part in fit)) for name, fit in fits.items()
    }
    with restored_unless_kept(pruned, changed) as keep:
        for name in changed:
            _add_(pruned.get_submodule(name), fits[name])
        after = judge.divergence(pruned) if changed else before
        if not after < before:
            return KernelRefit((), images, judge.images, errors, before, before, judge.objective.measure)
        keep()
    return KernelRefit(changed, images, judge.images, errors, before, after, judge.objective.measure)


class _Kept(NamedTuple):
    """Hold the channels of a dense layer that the pruned one still reads, and still makes."""

    read: list[int]
    made: list[int]


@dataclass(frozen=True)
class _Work:
    """Hold both models, and which channels the pruned one has."""

    pruned: nn.Module
    plan: PruningPlan
    judge: DenseReference
    probes: RandomProbes

    def layers(self) -> dict[str, _Kept]:
        """Return the layers that lost channels that they read and have some left, with what they read and make."""
        dense, read, made = self.judge.model, dict[str, set[int]](), dict[str, set[int]]()
        for entry in self.plan.sites:
            for reader in entry.site.readers:
                read.setdefault(reader.layer, set()).update(reader.first + channel for channel in entry.removed)
            for producer, rows_of in entry.site.places:
                made.setdefault(producer, set()).update(rows_of[channel] for channel in entry.removed)
        kept = {}
        for name in kernel_readers(dense, [entry.site for entry in self.plan.sites]):
            layer = dense.get_submodule(name)
            if read[name] and has_layer(self.pruned, name):
                kept[name] = _Kept(
                    [channel for channel in range(input_channels(layer)) if channel not in read[name]],
                    [channel for channel in range(output_channels(layer)) if channel not in made.get(name, ())],
                )
        return kept

    def fits(self, layers: Mapping[str, _Kept], batches: Iterable[Any]) -> tuple[int, dict[str, list[PatchFit]]]:
        """Run the dense model on all images; return their number, and a fit for each group of each layer."""
        dense, session = self.judge.model, self.judge.session
        device = next(dense.parameters()).device
        seen = [_Layer(dense, self.pruned, name, kept, self.probes) for name, kept in layers.items()]
        _log.info(
            "larger kernels: moments of the patches of %d layers, %.0f MB",
            len(seen),
            sum(one.nbytes for one in seen) / 1e6,
        )
        images = torch.zeros(1, dtype=torch.float64, device=device)
        hooks = [(dense.get_submodule(one.name), one.see) for one in seen]
        with torch.no_grad(), evaluation_mode(dense), hooked(hooks):
            for pixels in in_pieces(ImagesFor(dense, batches), device):
                with session.precision.autocast():
                    dense(pixels)
                images += len(pixels)
        total = int(session.processes.all_reduce_sum_(images))
        if not total:
            raise InputError("the refit of larger kernels needs at least one image, got none on any process")
        return total, {one.name: one.solve(session.processes) for one in seen}


class _Layer:
    """Add up what one layer of the dense model reads of the kept channels, and what it returns."""

    def __init__(self, dense: nn.Module, pruned: nn.Module, name: str, kept: _Kept, probes: RandomProbes) -> None:
        self.name, self._probes, self._images = name, probes, 0
        self._weights = _matrices(pruned.get_submodule(name))
        device = self._weights[0].device
        self._read, self._made = (torch.tensor(channels, device=device) for channels in kept)
        self._sums = [(PatchMoments.zero(weight), PatchMoments.zero(weight)) for weight in self._weights]

    @property
    def nbytes(self) -> int:
        """Return what the sums take of the device's memory, in bytes."""
        return sum(tensor.nbytes for pair in self._sums for one in pair for tensor in one.tensors)

    def see(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Take in a batch, as a hook after the layer of the dense model."""
        images, dim = len(output), channel_dim(module)
        wanted = rows(output.index_select(dim, self._made), dim, images)
        drawn = self._positions(*wanted.shape[:2]).to(output.device)
        values = args[0].index_select(dim, self._read)
        read = [rows(part, dim, images).take_along_dim(drawn, 1) for part in reads(module, values, output)]
        numbers = torch.tensor([self._probes.number(self._images + image) for image in range(images)])
        held_out = (numbers % _HELD_OUT_EVERY == 0).to(output.device)
        self._images += images
        parts = zip(
            in_float32(torch.stack(read, 2)).chunk(len(self._sums), -1),
            in_float32(wanted.take_along_dim(drawn, 1)).chunk(len(self._sums), -1),
            strict=True,
        )
        with torch.autocast(output.device.type, enabled=False):
            for (patches, outputs), weight, sums in zip(parts, self._weights, self._sums, strict=True):
                for mask, total in zip((~held_out, held_out), sums, strict=True):
                    total.add_(
                        PatchMoments.of(patches[mask].flatten(0, 1).flatten(1), outputs[mask].flatten(0, 1), weight)
                    )

    def _positions(self, images: int, positions: int) -> Tensor:
        if positions <= POSITIONS:
            return torch.arange(positions).expand(images, -1)[..., None]
        return self._probes.uniform(self._images, images, positions).topk(POSITIONS, dim=1).indices[..., None]

    def solve(self, processes: Processes) -> list[PatchFit]:
        """Return what is to be added to each group of outputs, from the images of all processes."""
        for pair in self._sums:
            for one in pair:
                for tensor in one.tensors:
                    processes.all_reduce_sum_(tensor)
        try:
            fits = [fit_patches(fitted, held_out) for fitted, held_out in self._sums]
        except InputError as error:
            raise InputError(f"layer {self.name}: {error}") from error
        # Another machine's sums could differ by a bit: all take what the first process found.
        return processes.all_gather([fit.to("cpu") for fit in fits])[0]


def _matrices(layer: nn.Module) -> list[Tensor]:
    """Return a convolution's weight as a matrix for each group, the bias as the last column, in float64."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    column = weight.new_zeros(len(weight)) if bias is None else bias
    assert isinstance(column, Tensor)
    whole = torch.cat([weight.detach().movedim(1, -1).flatten(1), column.detach()[:, None]], 1).double()
    return list(whole.chunk(groups_of(layer)))


def _add_(layer: nn.Module, fits: Sequence[PatchFit]) -> None:
    """Add the changes of all groups to a convolution."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    size = weight[0].numel() + 1
    zero = weight.new_zeros(len(weight) // len(fits), size, dtype=torch.float64)
    change = torch.cat([zero if fit.change is None else fit.change.to(weight.device) for fit in fits])
    out, width, *kernel = weight.shape
    add_in_float64_(weight, change[:, :-1].reshape(out, *kernel, width).movedim(-1, 1))
    if change[:, -1].any():
        add_to_bias_(layer, change[:, -1])


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
