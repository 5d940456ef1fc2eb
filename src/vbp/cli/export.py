"""The job of `vbp export`: a pruned model in, a proven file or checkpoint out that needs no vbp."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from vbp.cli.options import ExportConfig
from vbp.data.data_path import list_images
from vbp.data.images import Split, balanced_subset
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import Preprocessing, evaluation_transform
from vbp.deploy.artifact import PrunedArtifact, load_pruned, read_artifact
from vbp.deploy.export import ExportReport, check_export, export_model
from vbp.deploy.native import NativeReport, export_native
from vbp.errors import InputError
from vbp.runtime.forward import logits_of
from vbp.runtime.log_file import told_if_slow

_log = logging.getLogger(__name__)


def run_export(config: ExportConfig) -> ExportReport | NativeReport:
    """Export a pruned model and prove what was written; nothing is left of what is not true to the model."""
    if config.images < 2:
        raise InputError(f"images must be at least 2, got {config.images}; 32 is usual")
    if config.to == "native":
        _check_native(config)
    else:
        check_export(
            config.output, to=config.to, dtype=config.dtype, opset=config.opset, reduce_range=config.reduce_range,
            overwrite=config.overwrite,
        )  # fmt: skip
    if config.dtype == "int8" and config.data_path is None:
        raise InputError("dtype int8 needs calibration images, got no data_path; give --data_path")
    artifact = read_artifact(config.artifact)
    if artifact.preprocessing is None:
        raise InputError(
            f"{config.artifact} does not say how its images are prepared; export it in Python: vbp.export_model"
        )
    model = load_pruned(config.artifact)
    if config.data_path is None:
        _log.info("no --data_path: it is proven on two sample photographs alone")
        images, calibration, labelled = sample_photographs(artifact.preprocessing), None, None
    else:
        images, calibration, labelled = _images(
            config, config.data_path, artifact.class_names, artifact.preprocessing, model
        )
    if config.to == "native":
        return _native(config, artifact, model, images)
    with told_if_slow(_log, "exporting the model and running %s against it", config.output):
        return export_model(
            model,
            images,
            config.output,
            to=config.to,
            dtype=config.dtype,
            opset=config.opset,
            reduce_range=config.reduce_range,
            calibration=calibration,
            labelled=labelled,
            tolerance=config.tolerance,
            overwrite=config.overwrite,
        )


def _check_native(config: ExportConfig) -> None:
    if config.dtype != "float32":
        raise InputError(
            f"dtype is for onnx and pt2, got {config.dtype} with native, which keeps the weights as they are; leave "
            "--dtype out"
        )
    if config.opset is not None or config.reduce_range != "auto":
        raise InputError(
            "opset is for onnx and reduce_range for int8, got them with native, which keeps the weights as they are; "
            "leave them out"
        )
    if config.overwrite:
        raise InputError(
            "overwrite replaces a file, and native writes a folder, new or empty; leave --overwrite out and choose "
            "another --output"
        )


def _native(config: ExportConfig, artifact: PrunedArtifact, model: nn.Module, images: Tensor) -> NativeReport:
    if artifact.source is None:
        raise InputError(
            f"{config.artifact} does not say how its dense model is built; native is for models of timm and Hugging "
            "Face"
        )
    return export_native(
        model,
        images,
        config.output,
        plans=artifact.plans,
        source=artifact.source,
        preprocessing=artifact.preprocessing,
        class_names=artifact.class_names,
        tolerance=config.tolerance,
    )


def sample_photographs(preprocessing: Preprocessing) -> Tensor:
    """Return the two photographs that scikit-learn carries, prepared for a model."""
    from sklearn.datasets import load_sample_images  # takes seconds to import

    transform = evaluation_transform(preprocessing)
    return torch.stack([transform(Image.fromarray(photograph)) for photograph in load_sample_images().images])


def _images(
    config: ExportConfig,
    data_path: Path,
    names: tuple[str, ...] | None,
    preprocessing: Preprocessing,
    model: nn.Module,
) -> tuple[Tensor, Iterable[Tensor] | None, ImageLoader | None]:
    """Return the images that prove the file, and in reduced precision those for ranges and accuracy."""
    with torch.inference_mode():
        classes = logits_of(model(preprocessing.example_input())).shape[1]

    def loader(split: Split, count: int) -> ImageLoader:
        images = balanced_subset(list_images(data_path, split, classes, names), count, config.seed)
        return make_loader(
            images, evaluation_transform(preprocessing), batch_size=config.batch_size,
            num_workers=config.num_workers, max_pixels=config.max_pixels,
        )  # fmt: skip

    proof = torch.cat([pixels for pixels, _ in loader("val", config.images)])
    calibration = None
    if config.dtype == "int8":
        calibration = [pixels for pixels, _ in loader("train", config.calib_samples)]
    return proof, calibration, None if config.dtype == "float32" else loader("val", config.limit_val)
