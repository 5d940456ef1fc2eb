"""Hold a classifier with what belongs to it: how it is built again, and how its images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jaxtyping import Float
from torch import Tensor, nn

from vbp.data.preprocessing import Preprocessing
from vbp.errors import InputError, one_line
from vbp.runtime.choices import ModelType
from vbp.runtime.decode import from_json, to_json
from vbp.runtime.forward import output_tensors

Library = Literal["timm", "transformers"]
Family = Literal["vit", "convnext", "swin", "other"]


@dataclass(frozen=True)
class ModelSource:
    """What builds the same dense architecture again, untrained and without network; plain JSON types.

    Attributes:
        library: Who builds it.
        name: Timm's architecture name without tag, or the class name of the transformers model.
        arguments: Timm: the keyword arguments of `create_model`; transformers: the whole configuration,
            the attention implementation included.

    Example:
        >>> vbp.ModelSource("timm", "test_vit", {"num_classes": 7}).to_dict()["library"]
        'timm'
    """

    library: Library
    name: str
    arguments: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` reads them back."""
        plain: dict[str, Any] = to_json(self)
        return plain

    @property
    def has_head(self) -> bool:
        """Return whether the model returns logits: one without a head returns features."""
        if self.library == "timm":
            return self.arguments.get("num_classes") != 0
        return "ForImageClassification" in self.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSource:
        """Read back what `to_dict` returned, or raise an `InputError`."""
        return from_json(cls, values, "a model source", "save the file again with this version of vbp")


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation mode on the CPU, and what travels with it.

    Attributes:
        model: Takes images prepared by `preprocessing`; returns logits, or an output that has `logits`; features
            where it has no head.
        source: Builds the same dense architecture again.
        preprocessing: The model's own, with the user's overrides.
        num_classes: The logits per image; 0 for a model without a head.
        family: `vit` includes DeiT; `swin` and `convnext` include their second versions.
        class_names: Of each logit, in its order; None where the weights do not say it.

    Example:
        >>> vbp.load_classifier("test_vit", allow_random_init=True).num_classes
        1000
    """

    model: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    num_classes: int
    family: Family
    class_names: tuple[str, ...] | None = None

    def example_input(self, batch: int = 1) -> Float[Tensor, "batch channels height width"]:
        """Return images of noise of the size that the model takes, on the CPU: the same at every call."""
        return self.preprocessing.example_input(batch)


def hub_repository(model_name: str) -> str | None:
    """Return the hub repository of `timm/NAME` or `hf-hub:OWNER/NAME`; `None` for a name of timm's own registry."""
    if not model_name.startswith(("hf-hub:", "hf_hub:", "timm/")):
        return None
    repository = model_name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    try:
        validate_repo_id(repository.partition("@")[0])
    except HFValidationError as error:
        raise InputError(
            f"model name must be timm/NAME or hf-hub:OWNER/NAME, @REVISION behind it or not, got "
            f"{model_name[:200]!r}: {one_line(error)}"
        ) from error
    return repository


def cannot_fetch(model_name: str, error: BaseException) -> InputError:
    """Return the error for weights or a configuration that cannot be fetched from the hub."""
    return InputError(
        f"the weights of {model_name} could not be fetched from the Hugging Face hub ({one_line(error)}); check the "
        "name (no local folder has it) and the connection, or give --checkpoint FILE with a timm model name, or a "
        "local Hugging Face folder"
    )


def check_family(model_name: str, model_type: ModelType, family: Family) -> None:
    """Refuse a model of another family than it was said to be."""
    if model_type not in ("auto", family):
        raise InputError(
            f"model_type must be auto or {family!r}, the family of {model_name}, got {model_type!r}; change the "
            "model or its type"
        )


def check_has_head(classifier: Classifier, what: str) -> None:
    """Raise InputError for a model without classes; `what` says who needs them."""
    if classifier.num_classes == 0:
        raise InputError(
            f"{what} needs a model with classes, got {classifier.source.name} without a head; vbp run reports how "
            "alike a pruned model of features and its dense one see images"
        )


def check_takes_images(classifier: Classifier) -> None:
    """Pass one image of noise through the network, so that a wrong size or head stops the run at its start."""
    preprocessing = classifier.preprocessing
    height, width = preprocessing.img_size
    channels = len(preprocessing.mean)
    try:
        with torch.inference_mode():
            output = classifier.model(classifier.example_input())
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise InputError(
            f"{classifier.source.name} does not take images of {channels} x {height} x {width} (channels, "
            f"height, width): {one_line(error)}; give the img_size that the weights were trained with, and one "
            "mean and std for each input channel"
        ) from error
    if classifier.num_classes == 0 and output_tensors(output):
        return
    logits = getattr(output, "logits", output)
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, classifier.num_classes):
        raise InputError(
            f"{classifier.source.name} must return {classifier.num_classes} logits for one image, got "
            f"{list(shape) if shape else type(logits).__name__}; only image classifiers can be used"
        )
