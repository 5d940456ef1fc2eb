"""Every entry takes the same batches; labels and predictions of another shape are counted right or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vbp
from vbp.errors import InputError
from vbp.refit.stream import refit_stream_
from vbp.runtime.processes import Processes
from vbp.statistics.batches import pixels_of
from vbp.statistics.gradients import GradientSum
from vbp.statistics.mlp_samples import MLPSamples
from vbp.torch_pruning.compensate import reestimate_batchnorm_
from vbp.torch_pruning.importance import VarianceImportance

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 5


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **arguments).eval().to(dtype)


def split(make: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    return [make(pixels, labels) for pixels, labels in zip(IMAGES.split(8), LABELS.split(8), strict=True)]


KINDS: dict[str, Any] = {
    "a loader with labels": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8),
    "a Hugging Face collator": split(lambda pixels, labels: {"pixel_values": pixels, "labels": labels}),
    "a data set's columns": split(lambda pixels, labels: {"image": pixels, "label": labels.tolist()}),
    "arrays": split(lambda pixels, labels: [pixels.numpy(), labels.numpy()]),
    "columns of labels": split(lambda pixels, labels: (pixels, labels[:, None])),
    "a third part": split(lambda pixels, labels: (pixels, labels, torch.arange(8))),
    "an empty batch": [(IMAGES[:0], LABELS[:0]), *split(lambda pixels, labels: (pixels, labels))],
    "float64": split(lambda pixels, labels: (pixels.double(), labels)),
}


def first(values: Mapping[Any, Tensor]) -> Tensor:
    return next(iter(values.values()))


def by_importance(model: nn.Module, batches: Any) -> Tensor:
    importance = VarianceImportance()
    importance.collect_statistics(model, batches)
    return first(importance.variance)


def by_refit(model: nn.Module, batches: Any) -> float:
    judge = vbp.DenseReference(model, IMAGES.split(8))
    sites = vbp.find_sites(model, IMAGES[:1])
    return refit_stream_(make_model(), sites, batches, judge).images


def by_gradients(model: nn.Module, batches: Any) -> Tensor:
    gradients = GradientSum(model, vbp.find_sites(model, IMAGES[:1]))
    for _ in gradients.tee(batches):
        pass
    return gradients.mean(Processes())["blocks.0.mlp.fc1.weight"]


def by_norm(model: nn.Module, batches: Any) -> Tensor:
    norms = nn.Sequential(nn.BatchNorm2d(3))
    reestimate_batchnorm_(norms, batches, "cpu")
    return norms[0].running_mean  # type: ignore[return-value]


ENTRIES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "evaluate": lambda model, batches: vbp.evaluate(model, batches, "cpu"),
    "collect_statistics": lambda model, batches: first(
        vbp.collect_statistics(model, vbp.find_sites(model, IMAGES[:1]), batches).means
    ),
    "GradientSum": by_gradients,
    "DenseReference": lambda model, batches: torch.cat(vbp.DenseReference(model, batches).targets),
    "MLPSamples": lambda model, batches: (
        MLPSamples(model, vbp.find_sites(model, IMAGES[:1]), IMAGES[:1], batches).images
    ),
    "refit_stream_": by_refit,
    "VarianceImportance": by_importance,
    "reestimate_batchnorm_": by_norm,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_takes_the_same_batches(entry: str) -> None:
    """Kin to the reports of loaders with labels, and of dictionaries, that one function took and the next did not."""
    model = make_model()
    expected = ENTRIES[entry](model, split(lambda pixels, labels: (pixels, labels)))
    for kind, batches in KINDS.items():
        found = ENTRIES[entry](model, batches)
        same = torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
        assert same, kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_take_the_type_of_the_model(dtype: torch.dtype) -> None:
    """Kin to the reports of half-precision models that stop at float32 images."""
    model, batches = make_model(dtype), split(lambda pixels, labels: (pixels, labels))
    cast = [(pixels.to(dtype), labels) for pixels, labels in batches]
    assert vbp.evaluate(model, batches, "cpu") == vbp.evaluate(model, cast, "cpu")
    sites = vbp.find_sites(model, IMAGES[:1].to(dtype))
    means = [first(vbp.collect_statistics(model, sites, each).means) for each in (batches, cast)]
    assert torch.equal(*means)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.arange(8), r"must be floating-point tensors .*, got torch.int64 of shape \[8\]"),
        ((torch.arange(8), IMAGES[:8]), "let them come first"),
        (IMAGES[:8].to(torch.uint8), "got torch.uint8"),
        ({"x": IMAGES[:8]}, "a dictionary with pixel_values or image or images, got the keys x"),
        ("images", "got str"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(batch: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        pixels_of(batch)


def test_a_single_image_and_missing_labels_are_refused() -> None:
    with pytest.raises(InputError, match=r"must come in batches .* got shape \[3, 32, 32\]"):
        vbp.evaluate(make_model(), [(IMAGES[0], LABELS[:1])], "cpu")
    with pytest.raises(InputError, match="labels or label, got the keys image"):
        vbp.evaluate(make_model(), [{"image": IMAGES}], "cpu")
    with pytest.raises(InputError, match="gone through several times, got generator"):
        vbp.DenseReference(make_model(), (pixels for pixels in IMAGES.split(8)))


# --- evaluate: rows of logits as images, so that a count by hand is easy

LOGITS = torch.tensor([[0.0, 2, 1], [5, 1, 4], [1, 2, 3], [3, 2, 1]])
RIGHT = torch.tensor([1, 0, 2, 1])  # three of four


@pytest.mark.parametrize(
    ("labels", "model"),
    [
        (RIGHT[:, None], nn.Identity()),
        (RIGHT.float(), nn.Identity()),
        (RIGHT.numpy().astype(np.uint8), nn.Identity()),
        (torch.eye(3)[RIGHT], nn.Identity()),
        (torch.eye(3, dtype=torch.bool)[RIGHT], nn.Identity()),
        (RIGHT, nn.Unflatten(1, (3, 1, 1))),
    ],
)
def test_labels_and_logits_with_more_dimensions_are_counted_right(labels: Any, model: nn.Module) -> None:
    """Kin to the reports of MedMNIST's columns of labels (top-5 1167 %), one-hot rows and convolutional heads."""
    accuracy = vbp.evaluate(model, [(LOGITS, labels)], "cpu")
    assert (accuracy.correct1, accuracy.correct5, accuracy.images) == (3, 4, 4)


@pytest.mark.parametrize(
    ("labels", "model", "text"),
    [
        (RIGHT + 1, nn.Identity(), "from 0 to 2, as the model has 3 classes, got 3 and 0 more"),
        (torch.full((4,), -1), nn.Identity(), "got -1 and 3 more outside"),
        (RIGHT[:3], nn.Identity(), r"one class number for each of 4 images, .* got shape \[3\]"),
        (torch.full((4, 3), 1 / 3), nn.Identity(), r"got shape \[4, 3\] of torch.float32"),
        (RIGHT + 0.5, nn.Identity(), r"got shape \[4\] of torch.float32"),
        (RIGHT, nn.Unflatten(1, (1, 3)), r"one row of logits for each image, got shape \[4, 1, 3\]"),
        (RIGHT, nn.Threshold(2.5, float("nan")), r"got NaN or infinity for 4 of 4 images; check the weights"),
        (RIGHT, nn.Threshold(2.5, float("inf")), r"got NaN or infinity for 4 of 4 images; check the weights"),
    ],
)
def test_labels_and_predictions_that_are_none_are_refused(labels: Tensor, model: nn.Module, text: str) -> None:
    with pytest.raises(InputError, match=text):
        vbp.evaluate(model, [(LOGITS, labels)], "cpu")
