"""What pruning is to preserve of a model's output, and how an error in it counts; without labels.

    logits      KL(dense || pruned) of the predictions
    zeroshot    the same of softmax(scale cos(image, text)), for the image tower of a contrastive model
    features    mean_p mean_j (z_j - z'_j)^2 / v_j over the parts p of the output: tokens (or positions), and pooled

with v the variance of a channel in the dense model, so that 1 stands for features that say nothing. Up to second
order in an error of the output each is a quadratic form; `direction` draws vectors whose covariance is its matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.fisher import fisher_direction
from vbp.method.moments import RunningMoments
from vbp.runtime.choices import ObjectiveChoice, ObjectiveKind
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.forward import evaluation_mode, hooked, logits_of, output_tensors
from vbp.runtime.precision import in_float32
from vbp.statistics.batches import images_for
from vbp.statistics.images import ImageSource
from vbp.statistics.text_embeddings import TextEmbeddings

# Images of the variances; and those that run at a time.
SCALE_IMAGES: Final = 128
_PIECE: Final = 16

# A channel that hardly varies counts as if it had this share of the mean variance.
_FLOOR: Final = 0.01

# Names of the output that stands for an image as a whole, in the order of preference.
_POOLED: Final = ("image_embeds", "pooler_output")
KL: Final = "mean KL of the predictions from the dense model's"
_MEASURES: Final[Mapping[ObjectiveKind, str]] = {
    "logits": KL,
    "features": "mean standardised squared error of the features",
    "zeroshot": "mean KL of the image-text similarities from the dense model's",
}


@dataclass(frozen=True)
class Part:
    """A tensor of the output, or its mean over positions: its `name` there, and the deviation of each channel."""

    name: str
    dim: int
    pooled: bool
    positions: int
    scale: Float[Tensor, "channels"]

    def values(self, output: Mapping[str, Tensor]) -> Float[Tensor, "images positions channels"]:
        """Return its values, in float32 at least."""
        return _rows(in_float32(output[self.name]), self.dim, pooled=self.pooled)

    @property
    def size(self) -> int:
        """Return the number of values of an image."""
        return self.positions * len(self.scale)

    def __str__(self) -> str:
        return f"{self.name} ({f'{self.positions} positions' if self.positions > 1 else 'pooled'})"


@dataclass(frozen=True)
class Objective:
    """What is to be preserved: read from an output, compared, and differentiated.

    `parts` are those of the features, `embedded` the name of the output that stands for an image as a whole.

    Example:
        >>> Objective.of(model, [images]).kind
        'logits'
    """

    kind: ObjectiveKind
    parts: tuple[Part, ...] = ()
    embedded: str = ""
    text: TextEmbeddings | None = None

    @staticmethod
    def of(
        model: nn.Module,
        batches: Iterable[Any],
        choice: ObjectiveChoice = "auto",
        text: TextEmbeddings | None = None,
    ) -> Objective:
        """Choose by what the dense model returns; variances of features are those of the first 128 images.

        Args:
            model: The dense model, on its device.
            batches: Calibration images, the same on all processes.
            choice: What to preserve; `auto` takes the logits of a classifier, and the features of another model.
            text: What image embeddings are compared with; for `zeroshot`.

        Raises:
            InputError: The model does not return what was chosen, or there is no image.
        """
        pieces, left = list[Tensor](), SCALE_IMAGES
        for pixels in images_for(model, batches):
            pieces += torch.split(pixels[:left], _PIECE)
            left -= len(pixels)
            if left <= 0:
                break
        if not pieces:
            raise InputError(
                "the objective is chosen from the model's output for images, got none; give some hundred"
            )
        classifies = is_classifier(model, pieces[0])
        kind: ObjectiveKind = ("logits" if classifies else "features") if choice == "auto" else choice
        if kind == "logits":
            _output(model, pieces[0][:1], check=True)
            return Objective("logits")
        first = output_tensors(_output(model, pieces[0]))
        embedded = _embedded(first)
        if kind == "zeroshot":
            return _zeroshot(first, embedded, text, type(model).__name__)
        if not first:
            raise InputError(
                f"the objective features needs a model that returns tensors of numbers, got {type(model).__name__}, "
                "which returns none; wrap the model"
            )
        return Objective("features", _measured_parts(model, pieces, first), embedded)

    @staticmethod
    def choose(
        model: nn.Module,
        example: Tensor,
        images: ImageSource,
        choice: ObjectiveChoice = "auto",
        text: TextEmbeddings | None = None,
    ) -> Objective:
        """Choose as `of` does, and read calibration images only where variances are needed; all processes call it."""
        if choice == "auto":
            choice = "logits" if is_classifier(model, example) else "features"
        batches = images.first(SCALE_IMAGES) if choice == "features" else [example]
        # Sums in another order could differ by a bit: all take what the first process measured.
        return images.session.processes.all_gather(Objective.of(model, batches, choice, text))[0]

    @property
    def measure(self) -> str:
        """Return in words what `loss` is, as a mean over images."""
        return _MEASURES[self.kind]

    @property
    def fingerprint(self) -> str:
        """Return a fingerprint of all that decides; empty for logits."""
        if self.kind == "logits":
            return ""
        text = None if self.text is None else self.text.fingerprint
        parts = [[part.name, part.dim, part.pooled, part.scale.tolist()] for part in self.parts]
        return json_fingerprint([self.kind, self.embedded, text, parts])

    def sentence(self) -> str:
        """Return what is preserved, for the log."""
        what = {
            "logits": "the logits are preserved",
            "features": f"the features are preserved: {', '.join(map(str, self.parts))}",
            "zeroshot": f"the similarities of {self.embedded} with {len(self.text) if self.text else 0} texts are "
            "preserved",
        }[self.kind]
        return f"objective {self.kind}: {what}; plans and refits are judged by the {self.measure}"

    def read(self, output: Any) -> Float[Tensor, "images values"]:
        """Return the values that count, so that gradients reach the output.

        Features come divided by their deviation, and weighted so that the sum of squared errors is the loss.
        """
        if self.kind == "logits":
            return logits_of(output)
        tensors = output_tensors(output)
        if self.text is not None:
            return self.text.similarities(in_float32(tensors[self.embedded]))
        values = []
        for part in self.parts:
            rows = part.values(tensors)
            count = len(self.parts) * rows.shape[1] * rows.shape[2]
            values.append((rows / part.scale.to(rows)).flatten(1) / count**0.5)
        return torch.cat(values, 1)

    def target(self, values: Float[Tensor, "images values"]) -> Float[Tensor, "images values"]:
        """Return what `loss` compares with: of the dense model's values."""
        values = in_float32(values)
        return values if self.kind == "features" else values.log_softmax(-1)

    def loss(self, values: Float[Tensor, "images values"], target: Float[Tensor, "images values"]) -> Tensor:
        """Return the sum over images of the error of other values."""
        if self.kind == "features":
            return (in_float32(values) - target).square().sum()
        return F.kl_div(in_float32(values).log_softmax(-1), target, log_target=True, reduction="sum")

    def direction(
        self, values: Float[Tensor, "images values"], noise: Float[Tensor, "images values"]
    ) -> Float[Tensor, "images values"]:
        """Return for each image a random vector whose covariance is the second derivative of the loss."""
        if self.kind == "features":
            return noise.to(values) * 2**0.5
        return fisher_direction(values, noise)

    def part_of(
        self, name: str, target: Float[Tensor, "images values"]
    ) -> tuple[Float[Tensor, "images channels"], Float[Tensor, "channels"]]:
        """Return the target of an output of rows, as the model returns it, and the weights of its squared errors."""
        start = 0
        for part in self.parts:
            if part.name == name and part.positions == 1:
                factor = part.scale.to(target) * (len(self.parts) * part.size) ** 0.5
                return target[:, start : start + part.size] * factor, factor**-2
            start += part.size
        raise AssertionError(f"{name} is no row of the objective")

    def embedding(self, output: Any) -> Float[Tensor, "images channels"]:
        """Return one row for each image, by which images are compared: pooled features, or logits."""
        if self.kind == "logits":
            return in_float32(logits_of(output))
        values = in_float32(output_tensors(output)[self.embedded])
        return _rows(values, channel_dim_of(values), pooled=True).flatten(1)


def is_classifier(model: nn.Module, pixels: Tensor) -> bool:
    """Return whether a model returns logits: it calls them so, or they are rows that no norm made.

    Pooled features come from a norm, or from a model that says that it has no classes.
    """
    leaves: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        leaves[:] = [module]

    layers = [each for each in model.modules() if not [*each.children()] and [*each.parameters(recurse=False)]]
    with hooked((layer, note) for layer in layers):
        output = _output(model, pixels[:2])
    try:
        logits_of(output)
    except InputError:
        return False
    if getattr(model, "num_classes", None) == 0 or getattr(getattr(model, "config", None), "num_labels", None) == 0:
        return False
    return not isinstance(output, Tensor) or not leaves or "norm" not in type(leaves[0]).__name__.lower()


def check_classifier(model: nn.Module, pixels: Tensor, what: str) -> None:
    """Raise InputError for a model that returns features: what needs logits would take them for some."""
    if not is_classifier(model, pixels):
        raise InputError(
            f"{what} must come from a classifier, got {type(model).__name__}, which returns features; choose what "
            "needs no labels"
        )


def channel_dim_of(values: Tensor) -> int:
    """Return the dimension of the channels of a tensor of features, counted from the end.

    Maps are square in most models, and channels last where the first two of three dimensions agree and the last not.
    """
    if values.ndim < 4:
        return -1
    first, second, third = values.shape[1:4]
    return -1 if values.ndim > 4 or (first == second != third) else -3


def _output(model: nn.Module, pixels: Tensor, *, check: bool = False) -> Any:
    with evaluation_mode(model), torch.no_grad():
        output = model(pixels)
    if check:
        logits_of(output)
    return output


def _rows(values: Tensor, dim: int, *, pooled: bool) -> Float[Tensor, "images positions channels"]:
    rows = values.movedim(dim, -1).reshape(len(values), -1, values.shape[dim])
    return rows.mean(1, keepdim=True) if pooled else rows


def _embedded(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the output that stands for an image: a pooled one, or the last."""
    rows = [name for name, values in tensors.items() if values.ndim == 2]
    return next((name for name in (*_POOLED, *rows, *reversed([*tensors])) if name in tensors), "")


def _zeroshot(tensors: Mapping[str, Tensor], embedded: str, text: TextEmbeddings | None, model: str) -> Objective:
    if text is None:
        raise InputError("the objective zeroshot needs text embeddings, got none; give --text_embeddings FILE")
    shape = list(tensors[embedded].shape) if embedded else []
    if len(shape) != 2 or shape[1] != text.rows.shape[1]:
        raise InputError(
            f"the objective zeroshot needs a model that returns one embedding of {text.rows.shape[1]} numbers for "
            f"each image, as its text embeddings have, got shape {shape} of {model}; give the embeddings of its own "
            "text tower, or the tower with its projection"
        )
    return Objective("zeroshot", embedded=embedded, text=text)


def _measured_parts(model: nn.Module, pieces: Iterable[Tensor], first: Mapping[str, Tensor]) -> tuple[Part, ...]:
    """Return the parts of the output, with the deviation of their channels over the images.

    Where no output stands for the image as a whole, the mean of each over its positions does.
    """
    whole, parts = any(values.ndim == 2 for values in first.values()), list[Part]()
    for name, values in first.items():
        dim = channel_dim_of(values)
        channels = values.shape[dim]
        positions = values[0].numel() // channels
        parts.append(Part(name, dim, False, positions, torch.empty(channels)))
        if not whole:
            parts.append(Part(name, dim, True, 1, torch.empty(channels)))
    moments = [RunningMoments() for _ in parts]
    for pixels in pieces:
        tensors = output_tensors(_output(model, pixels))
        for part, running in zip(parts, moments, strict=True):
            running.add_(part.values(tensors).flatten(0, 1))
    return tuple(replace(part, scale=_deviation(running, part)) for part, running in zip(parts, moments, strict=True))


def _deviation(running: RunningMoments, part: Part) -> Float[Tensor, "channels"]:
    seen = running.moments
    assert seen is not None
    variance = (seen.m2 / seen.count).cpu()
    if not bool(variance.isfinite().all()):
        raise InputError(f"the features {part} must be finite, got NaN or infinity; check weights and preprocessing")
    scale = (variance + _FLOOR * variance.mean()).sqrt()
    if not float(scale.max()) > 0:
        raise InputError(
            f"the features {part} must differ between calibration images, got the same for all; give images that "
            "differ, and a model that was trained"
        )
    return scale.float()
