"""Refit the last linear layer of a pruned model to the dense model's predictions: convex, without labels.

What the sites' own refits leave adds up on its way to the classifier. There the errors of all sites are seen
together, and the divergence is a convex function of the last layer's weight. `vbp.method.head_fit` has the problem,
whose one solution is folded into the layer. One forward pass of each model is all that it needs.

Few images say little of so many coefficients, so cross-validation decides: if the fit does not help, one
with ten times the penalty is tried, and if that does not help either, the layer stays as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.head_fit import FOLDS, HeadProblem
from vbp.pruning.divergence import DenseReference
from vbp.runtime.forward import evaluation_mode, hooked, logits_of, output_tensors
from vbp.runtime.log_file import told_if_slow
from vbp.runtime.precision import Precision, in_float32
from vbp.runtime.processes import Processes
from vbp.statistics.objective import KL, Objective

_log = logging.getLogger(__name__)

# Strength of the penalty times the number of images: the more images, the more coefficients they can tell. On
# DeiT-tiny the best on unseen images lies between 10 and 30 for 800 images; the images of the statistics, which
# look better than others, would ask for 100.
_STRENGTH_TIMES_IMAGES = 25_000.0


@dataclass(frozen=True)
class HeadRefit:
    """Tell what the refit of the last layer did: the error of the objective before and after.

    It is cross-validated: on images that the compared fits had not seen. The strength of the penalty is infinite if
    the layer was left as it was, for no refit was better.
    """

    layer: str
    images: int
    strength: float
    before: float
    after: float
    measure: str = KL

    def sentence(self) -> str:
        """Return in words what became of the layer."""
        if not math.isfinite(self.strength):
            return f"the last layer, {self.layer}, stays as it is: no refit to {self.images} images helped"
        return (
            f"the last layer, {self.layer}, is refitted to {self.images} images: {self.measure} "
            f"{self.before:.4f} -> {self.after:.4f} (cross-validated)"
        )


@told_if_slow(_log, "refitting the last layer")
def refit_head_(pruned: nn.Module, reference: DenseReference) -> HeadRefit:
    """Refit the last linear layer to the dense model's output, if cross-validation says that it helps.

    Where the objective is features, those that the layer makes count, not other parts of the output.

    Same result on all processes of `reference`, which must all call it.

    Raises:
        InputError: There are too few images, the models do not end in one linear layer, or a value is not finite.
    """
    check_images(reference.images // reference.views)
    session, objective = reference.session, reference.objective
    seen = [_seen_by_head(pruned, batch, objective, session.precision) for batch in reference.batches]
    name = _agreed([one.layer for one in seen], session.processes)
    dense = last_linear(reference.model, reference.example(), objective)
    if name != dense:
        raise InputError(f"the pruned model must end in the layer of the dense one, {dense}, got {name}")
    features = _gathered([one.read for one in seen], session.processes)
    layer = pruned.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    target, weights = _gathered(reference.targets, session.processes), None
    if objective.kind == "features":
        made = _agreed([one.made for one in seen], session.processes)
        target, weights = objective.part_of(made, target)
    problem = HeadProblem.of(layer, features, target, weights)
    if not bool(problem.features.isfinite().all() and problem.logits.isfinite().all()):
        raise InputError(
            f"what {name} reads and returns must be finite, got NaN or infinity; prune less, or in float32"
        )
    before = problem.divergence(None)
    strength = _STRENGTH_TIMES_IMAGES / len(features)
    after = problem.cross_validated(strength, reference.views)
    if not after < before:
        strength *= 10
        after = problem.cross_validated(strength, reference.views)
    if not after < before:
        return HeadRefit(name, len(features), float("inf"), before, before, objective.measure)
    # Sums in another order could differ by a bit: all take what the first process found.
    weight, bias = session.processes.all_gather(problem.fold_into_weight(problem.fit(strength)))[0]
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(bias.to(layer.weight))
        else:
            layer.bias.copy_(bias)
    return HeadRefit(name, len(features), strength, before, after, objective.measure)


def check_images(images: int) -> None:
    """Raise InputError if there are fewer images than folds of the cross-validation."""
    if images < FOLDS:
        raise InputError(f"the refit of the last layer needs at least {FOLDS} images, got {images}; give more")


def last_linear(model: nn.Module, example: Tensor, objective: Objective) -> str:
    """Return the name of the linear layer whose output is the model's; raise InputError if there is none."""
    return _seen_by_head(model, example, objective, Precision()).layer


@dataclass(frozen=True)
class _Seen:
    """The last linear layer, what it read, and the name in the model's output of what it made."""

    layer: str
    read: Float[Tensor, "images width"]
    made: str


def _seen_by_head(model: nn.Module, batch: Tensor, objective: Objective, precision: Precision) -> _Seen:
    """Return which linear layer the logits or features of a batch come from, and what it read.

    Raises:
        InputError: They come from no such layer.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[:] = [(name, args[0], output)]

    device = next(model.parameters()).device
    layers = [(layer, partial(note, name)) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    with hooked(layers), evaluation_mode(model), torch.no_grad(), precision.autocast():
        output = model(batch.to(device, non_blocking=True))
    tensors = {"logits": logits_of(output)} if objective.kind == "logits" else output_tensors(output)
    made = [name for name, values in tensors.items() if calls and values is calls[0][2]]
    if objective.kind == "zeroshot" or not made or calls[0][1].ndim != 2:
        what = "logits" if objective.kind == "logits" else "features"
        raise InputError(
            f"the refit of the head needs a model whose {what} are the output of one last Linear layer, got "
            f"{type(model).__name__}, whose {what} are not; leave the head as it is"
        )
    return _Seen(calls[0][0], in_float32(calls[0][1]), made[0])


def _gathered(rows: Sequence[Tensor], processes: Processes) -> Float[Tensor, "images width"]:
    """Return the rows of all processes, on the CPU, in the order in which one process would have them."""
    shares = processes.all_gather([one.cpu() for one in rows])
    return torch.cat([one for batches in zip_longest(*shares) for one in batches if one is not None])


def _agreed(names: Sequence[str], processes: Processes) -> str:
    """Return the one name that all batches of all processes end in; a process without images has none."""
    layers = {name for one in processes.all_gather(sorted(set(names))) for name in one}
    if len(layers) != 1:
        raise InputError(f"all images must end in one layer, got {', '.join(sorted(layers)) or 'none'}")
    return layers.pop()
