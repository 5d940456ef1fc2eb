"""Flags of the small commands; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from vbp.data.formats import MAX_PIXELS
from vbp.deploy.settings import ExportPrecision, LatencySettings
from vbp.runtime.choices import Amp, TableForm, Toggle

ExportTarget = Literal["onnx", "pt2", "openvino", "executorch", "native"]


@dataclass(frozen=True)
class InspectConfig:
    """List the sites of a model with their shapes, MACs and parameters; nothing is pruned.

    Example: vbp inspect deit_tiny_patch16_224
    """

    model: tyro.conf.Positional[str]
    """A pruned model that vbp saved, a folder with a Hugging Face model, a hub id, or a timm name (built of random
    weights: nothing is downloaded)."""
    attention: bool = False
    """Refuse a model without attention that can be pruned; otherwise it is listed where there is any."""
    convolutions: bool = False
    """Also channels between convolutions with larger kernels, as in a ResNet."""
    include: tuple[str, ...] = ()
    """Patterns over the dotted names of the sites, as 'blocks.[0-5].*': select these alone."""
    exclude: tuple[str, ...] = ()
    """Likewise: leave these out, of what --include selects or all."""
    json: bool = False
    """Print JSON in the place of a table."""


@dataclass(frozen=True)
class LatencyConfig(LatencySettings):
    """Time a pruned model against its dense one, in turns, beside what its MACs promise.

    Example: vbp latency output/vbp/artifact --batch_sizes 1 32 --threads 1
    """

    artifact: tyro.conf.Positional[str]
    """A pruned model that vbp saved; the dense one is built of random weights, which take as long."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images in a batch."""
    device: str = field(default="auto", kw_only=True)
    """auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N."""
    output: Path | None = None
    """JSON file for the figures."""
    json: bool = False
    """Print JSON in the place of a table."""


@dataclass(frozen=True)
class ExportConfig:
    """Export a pruned model to what runs without vbp, and prove it on real images.

    Example: vbp export output/vbp/artifact --to onnx --output model.onnx --data_path /data/imagenet
    """

    artifact: tyro.conf.Positional[str]
    """A pruned model that vbp saved."""
    output: Path
    """The file to write, which ends in .onnx, .pt2 or .pte (ExecuTorch), as --to says; for openvino and native a new
    folder."""
    to: ExportTarget = "onnx"
    """onnx for onnxruntime and others, pt2 for torch.export, openvino for processors of Intel and others, executorch
    for phones and boards, native for a checkpoint of timm or Hugging Face, where its configuration can hold the
    widths."""
    dtype: ExportPrecision = "float32"
    """Precision of weights and arithmetic: int8 for onnx and openvino, bfloat16 for pt2 alone; the input stays
    float32."""
    opset: int | None = None
    """With --to onnx: version of ONNX's operators, for a runtime that knows no later ones."""
    reduce_range: Toggle = "auto"
    """With --dtype int8: weights take 7 bits (on), for processors without VNNI, whose 8-bit products can saturate;
    auto looks at this processor."""
    data_path: Path | None = None
    """Folder with train/<class>/ and val/<class>/: its validation images prove the file, and in reduced precision its
    accuracy is measured. Without it two sample photographs prove it; int8 needs it."""
    images: int = 32
    """Validation images on which the file must return the model's logits, at least 2."""
    calib_samples: int = 128
    """With --dtype int8: training images that set the ranges, chosen class-balanced by the seed."""
    limit_val: int = 1000
    """In reduced precision: validation images for the accuracy, chosen class-balanced by the seed; 0 takes all."""
    batch_size: int = 32
    """Images in a calibration or evaluation batch."""
    num_workers: int = 4
    """Processes that read images; 0 reads in the main process."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is read; one with more counts as unreadable."""
    tolerance: float | None = None
    """Greatest difference of two logits, as a share of the largest logit; 1e-4 for float32, 0.01 for float16, 0.1 for
    bfloat16 and 0.25 for int8 unless given."""
    overwrite: bool = False
    """Replace an earlier file of that name."""
    seed: int = 0
    """Seed of the subsets."""
    json: bool = False
    """Print JSON in the place of a table."""


@dataclass(frozen=True)
class EvalConfig:
    """Measure top-1 and top-5 accuracy of a model, pruned or not, and where it agrees with its dense model.

    Example: vbp eval output/vbp --data_path /data/imagenet --dense auto
    """

    model: tyro.conf.Positional[str]
    """The folder of a run, a pruned model that vbp saved, or a dense one as for vbp run --model_name."""
    data_path: str
    """Folder with val/<class>/; or hfds/... or wds/..., see docs/data.md."""
    dense: str | None = None
    """Also evaluate a dense model, and count where both are right: auto for the one that the run began with, or its
    name."""
    checkpoint: Path | None = None
    """Weights for a timm model that is not pruned."""
    limit_val: int = 0
    """Validation images, chosen class-balanced by the seed; 0 takes all."""
    val_batch_size: int = 128
    """Images in a batch."""
    num_workers: int = 4
    """Processes that read images; 0 reads in the main process."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is read; one with more counts as unreadable."""
    amp: Amp = "auto"
    """Autocast: bf16, fp16, off, or auto (bf16 where the GPU has it)."""
    device: str = "auto"
    """auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the subset."""
    output: Path | None = None
    """JSON file for the figures."""
    json: bool = False
    """Print JSON in the place of a table."""


@dataclass(frozen=True)
class PredictConfig:
    """Print the most likely classes of image files, and their probabilities.

    Example: vbp predict output/vbp photo.jpg
    """

    model: tyro.conf.Positional[str]
    """The folder of a run, a pruned model that vbp saved, or a dense one as for vbp run --model_name."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    top: int = 5
    """Classes to print for each."""
    checkpoint: Path | None = None
    """Weights for a timm model that is not pruned."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is read."""
    json: bool = False
    """Print JSON in the place of a table."""


@dataclass(frozen=True)
class CompareConfig:
    """Show runs side by side: what differs in their settings, and what came of it.

    Example: vbp compare output/keep_65 output/keep_50
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of two or more runs, or of the pruned models in them."""
    form: TableForm = "table"
    """table with a column for each run, or csv or markdown with a row for each."""
    json: bool = False
    """Print JSON in the place of a table."""
