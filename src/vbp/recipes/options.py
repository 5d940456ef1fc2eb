"""Flags that several commands have in common, in groups, and the role of each setting; nothing here needs torch.

A configuration inherits its groups. Its fields, and the flags in its help, stand in the order of its bases from the
last to the first.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import tyro

from vbp.data.formats import MAX_PIXELS
from vbp.method.defaults import RIDGE
from vbp.runtime.choices import Amp, BatchNormChoice, MatmulPrecision, ModelType, Toggle
from vbp.runtime.decode import parse_json

T = TypeVar("T")


class Role(enum.Enum):
    """The purpose of a setting. Each field has one of the first five, and those of fine-tuning TUNING besides."""

    RESULT = enum.auto()
    """Decides the result by its value. The batch size of evaluation, compilation and checkpointing of activations
    are among them, for they change sums in their last bits."""
    SOURCE = enum.auto()
    """Decides it through something that is compared by itself: weights, images, precision, rows of a table."""
    LOCAL = enum.auto()
    """Likewise, or says nothing about the pruned model, and is not published with it: a path of this machine, or what
    has a place of its own there, as the preprocessing."""
    SPEED = enum.auto()
    """Changes only when and how fast things are done. Order and augmentation are drawn from seed, epoch and sample,
    not by a worker; statistics from a file are read before the first checkpoint, which holds plan and weights."""
    LAUNCH = enum.auto()
    """How this attempt is started, and where its results go: a run folder may be moved."""
    TUNING = enum.auto()
    """Read by fine-tuning alone."""


Result = Annotated[T, Role.RESULT]
Source = Annotated[T, Role.SOURCE]
Local = Annotated[T, Role.LOCAL]
Speed = Annotated[T, Role.SPEED]
Launch = Annotated[T, Role.LAUNCH]
Tuning = Annotated[T, Role.RESULT, Role.TUNING]


def roles_of(kind: type) -> dict[str, frozenset[Role]]:
    """Return the roles of each field of a configuration, in the order of the fields."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: frozenset(
            mark for mark in getattr(hints[field.name], "__metadata__", ()) if isinstance(mark, Role)
        )
        for field in dataclasses.fields(kind)
    }


def fields_with(kind: type, *roles: Role) -> tuple[str, ...]:
    """Return the names of the fields that have one of these roles, in their order."""
    return tuple(name for name, marks in roles_of(kind).items() if marks & {*roles})


# Flags of what is refitted after surgery, in the order in which it is.
REFITS: Final = ("refit_kernels", "refit_producers", "refit_stream", "refit_head")

# With more the statistics pass of DeiT-tiny on a CPU would take over 1.3 times the bare forward pass
# (benchmarks/results).
COVARIANCE_TOKENS: Final = 0.2


# A flag whose value is a JSON object.
JSON_OBJECT: Final = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda words: _json_object(words[0]),
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


def _json_object(text: str) -> dict[str, Any]:
    """Return the object; a ValueError is a usage error."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f'it must be a JSON object, as {{"num_classes": 10}}, got {text}')
    return value


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and on what data."""

    data_path: Local[str]
    """Folder with train/<class>/ and val/<class>/; or hfds/... or wds/..., see docs/data.md."""
    model_type: Source[ModelType] = "vit"
    """Family that the model must belong to (vit includes DeiT); auto checks nothing."""
    model_name: Source[str] = "google/vit-base-patch16-224"
    """A folder with a Hugging Face model, a hub id (with /), or a timm name; or a pruned model that vbp saved or the
    folder of a run, to prune it further."""
    checkpoint: Local[Path | None] = None
    """Weights for a timm model in the place of a download: .safetensors, or .pth, .pt, .bin, .ckpt, .pth.tar."""
    convnext_checkpoint: Local[Path | None] = None
    """One of Facebook's original ConvNeXt checkpoints (.pth), with --model_type convnext."""
    allow_random_init: Source[bool] = False
    """Allow weights that no file provides to stay at random."""
    allow_bad_dense: Launch[bool] = False
    """Go on though the dense model is not above chance on the validation images."""
    img_size: Local[int | None] = None
    """Override the model's preprocessing: height and width of the input, in pixels."""
    crop_pct: Local[float | None] = None
    """Override the model's preprocessing: share of the resized image that the centre crop keeps."""
    interpolation: Local[str | None] = None
    """Override the model's preprocessing: bicubic, bilinear or nearest."""
    mean: Local[tuple[float, ...] | None] = None
    """Override the model's preprocessing: mean of each colour, for pixels in 0..1."""
    std: Local[tuple[float, ...] | None] = None
    """Override the model's preprocessing: standard deviation of each colour, for pixels in 0..1."""
    model_kwargs: Local[Annotated[dict[str, Any], JSON_OBJECT]] = dataclasses.field(default_factory=dict)
    """Further arguments of timm.create_model, as a JSON object: '{"num_classes": 10}'."""


@dataclass(frozen=True)
class LoadingOptions:
    """How images are read."""

    val_batch_size: Result[int] = 128
    """Images in a calibration or evaluation batch of one process."""
    num_workers: Speed[int] = 4
    """Processes that read images, for each process of the job; 0 reads in the process itself."""
    prefetch: Speed[int] = 2
    """Batches that each of them reads ahead."""
    limit_val: Result[int] = 0
    """Validation images, chosen class-balanced by the seed; 0 takes all."""
    max_pixels: Result[int] = MAX_PIXELS
    """Pixels of the largest image that is read; one with more counts as unreadable."""


@dataclass(frozen=True)
class DataOptions(LoadingOptions):
    """How images are read, and which for the statistics."""

    calib_samples: Source[int | Literal["auto"]] = 0
    """Training images for the statistics, chosen class-balanced by the seed; 0 takes all; auto stops when the plan
    has converged."""


@dataclass(frozen=True)
class RefitOptions:
    """What stands in for removed channels beyond the mean shift."""

    calib_views: Result[int] = 1
    """Views of each image of which the statistics are made, one in so many as for evaluation, the others random
    crops: so many times as long, and nearer to what other images would say."""
    covariance_tokens: Result[float] = COVARIANCE_TOKENS
    """With refit: share of the tokens of each image that count for the covariance, in (0, 1]."""
    ridge: Result[float] = RIDGE
    """How much the refit is regularised at least, as a share of each kept channel's variance: by channels over
    samples where that is more."""
    batchnorm: Result[BatchNormChoice] = "auto"
    """Running statistics of BatchNorms after surgery: estimated anew in the pruned model (recalibrate), moved by the
    difference of both models (match), left (keep), or what held-out images prefer (auto)."""
    refit_kernels: Result[Toggle] = "auto"
    """With refit: also refit the convolutions with larger kernels from the patches that they read, where there is
    one (auto), always (on) or never (off)."""
    refit_producers: Result[Toggle] = "auto"
    """With refit: also refit the layers that make the hidden channels, by a Gauss-Newton step in each MLP, where
    there is one of two layers with a known activation between them (auto), always (on) or never (off)."""
    refit_stream: Result[Toggle] = "auto"
    """With refit: also bring the residual stream back to the dense model's, by a fit at three depths, where
    there is one (auto), always (on) or never (off)."""
    refit_head: Result[Toggle] = "auto"
    """With refit: also refit the last layer to the dense model's predictions, where the model ends in a linear
    layer (auto), always (on) or never (off)."""
    refit_views: Result[int | Literal["auto"]] = "auto"
    """With refit: how many views of each image the refits after surgery read, one in so many as for evaluation, the
    others random crops; auto is 4 on a GPU and 1 on a CPU."""


@dataclass(frozen=True)
class WidthOptions:
    """Which widths are allowed, and where."""

    round_to: Result[int | Literal["auto"]] = 1
    """Keep channel counts at multiples of this; 8 or 64 suit most hardware; auto takes what suits the device."""
    min_keep_ratio: Result[float] = 0.02
    """Floor: no layer keeps a smaller share than this; above the default no branch is removed whole either."""
    bottleneck: Result[bool] = False
    """Prune inside attention too: value channels, and query and key channels in pairs, the same in every head."""
    convolutions: Result[bool] = False
    """Prune between convolutions with larger kernels too, as in a ResNet."""
    include: Result[tuple[str, ...]] = ()
    """Patterns over the dotted names of the layers that vbp inspect lists, as 'blocks.[0-5].*': prune these alone."""
    exclude: Result[tuple[str, ...]] = ()
    """Likewise: leave these as they are, out of what --include takes or all."""
    stats_path: Speed[Path | None] = None
    """A statistics.safetensors of the same model and data, reused in the place of a calibration pass."""


@dataclass(frozen=True)
class ProcessOptions:
    """How the processes compute, and where they write."""

    amp: Source[Amp] = "auto"
    """Autocast of statistics, evaluation and training: bf16, fp16, off, or auto (bf16 where the GPU has it, and for
    --tune where the CPU has it)."""
    matmul_precision: Result[MatmulPrecision] = "high"
    """Float32 products on a GPU: high uses TF32, highest does not."""
    processes: Launch[int] = 1
    """Start so many processes on this machine, without torchrun; each takes a GPU of its own if there are GPUs."""
    timeout_minutes: Speed[float] = 30.0
    """Longest wait of one process for another before the job ends with an error."""
    save_dir: Launch[Path] = Path("./output/vbp")
    """Where log, checkpoints and report go."""
    overwrite: Launch[bool] = False
    """Replace the results of another run in save_dir."""
    seed: Result[int] = 0
    """Seed of subsets, order and augmentation."""
    device: Local[str] = "auto"
    """auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N; under torchrun a GPU for each process."""
