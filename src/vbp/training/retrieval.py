"""How alike two models see the same images, without labels: cosine of their embeddings, nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.runtime.forward import evaluation_mode
from vbp.runtime.precision import Precision
from vbp.runtime.processes import Processes
from vbp.statistics.batches import images_for
from vbp.statistics.objective import Objective

_OFF, _ALONE = Precision(), Processes()

# Neighbours of an image that are compared, and images whose neighbours are searched at a time.
NEAREST: Final = 10
_ROWS: Final = 1024


@dataclass(frozen=True)
class Embeddings:
    """One row for each image, and, of predictions, the most likely class or text; on the CPU."""

    rows: Float[Tensor, "images channels"]
    classes: Int[Tensor, "images"] | None = None


@dataclass(frozen=True)
class Retrieval:
    """How alike a model and its dense model see `images` images.

    Attributes:
        cosine: Of the embeddings of both, mean over the images.
        neighbours: Percent of the nearest images, 10 of each, that both have in common.
        same: Percent of the images with the same most likely class or text; None for features.
        images: Images compared.
    """

    cosine: float
    neighbours: float
    same: float | None
    images: int


def embed(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Any],
    device: torch.device | str,
    *,
    precision: Precision = _OFF,
    processes: Processes = _ALONE,
) -> Embeddings:
    """Return the embeddings of all images of all processes, which all call this and get the same.

    Raises:
        InputError: There are fewer than two images, or a value is not finite.
    """
    rows, classes = list[Tensor](), list[Tensor]()
    with evaluation_mode(model), torch.no_grad():
        for pixels in images_for(model, batches, device):
            with precision.autocast():
                output = model(pixels)
            rows.append(objective.embedding(output).float().cpu())
            if objective.kind != "features":
                classes.append(objective.read(output).argmax(1).cpu())
    gathered = [part for share in processes.all_gather(rows) for part in share]
    if sum(map(len, gathered)) < 2:
        raise InputError("retrieval needs at least two images to compare, got fewer; check the validation images")
    every = torch.cat(gathered)
    if bad := int((~every.isfinite()).any(1).sum()):
        raise InputError(
            f"the output of {type(model).__name__} must be finite, got NaN or infinity for {bad} of {len(every)} "
            "images; check the weights and the preprocessing, or compute in float32"
        )
    chosen = [part for share in processes.all_gather(classes) for part in share]
    return Embeddings(every, torch.cat(chosen) if chosen else None)


def compare_embeddings(dense: Embeddings, other: Embeddings) -> Retrieval:
    """Return how alike two models see the same images, given in the same order.

    Raises:
        InputError: They are of other images.
    """
    if dense.rows.shape != other.rows.shape:
        raise InputError(
            f"embeddings to compare must be of the same images, got shapes {list(dense.rows.shape)} and "
            f"{list(other.rows.shape)}; read them again"
        )
    first, second = (F.normalize(each.rows, dim=1) for each in (dense, other))
    images, count = len(first), min(NEAREST, len(first) - 1)
    common = 0
    for start in range(0, images, _ROWS):
        near = [_nearest(rows, start, count) for rows in (first, second)]
        common += int((near[0][:, :, None] == near[1][:, None, :]).sum())
    same = None
    if dense.classes is not None and other.classes is not None:
        same = 100 * float((dense.classes == other.classes).double().mean())
    cosine = float((first * second).sum(1).double().mean())
    return Retrieval(min(cosine, 1.0), 100 * common / (images * count), same, images)


def _nearest(rows: Float[Tensor, "images channels"], start: int, count: int) -> Int[Tensor, "some count"]:
    """Return the images nearest to some images by cosine, themselves left out."""
    similar = rows[start : start + _ROWS] @ rows.T
    similar[torch.arange(len(similar)), torch.arange(start, start + len(similar))] = -torch.inf
    return similar.topk(count, dim=1).indices
