"""A run on data and a model that the package carries: handwritten digits and a small ViT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

from vbp.data.data_path import list_images
from vbp.data.digits import CROP_SCALE, HFLIP, MODEL_KWARGS, MODEL_NAME, PREPROCESSING, WEIGHTS, write_digits
from vbp.data.images import Split
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import evaluation_transform
from vbp.errors import InputError
from vbp.models.classifier import Classifier
from vbp.models.load import load_classifier
from vbp.recipes.config import DemoConfig, RunConfig
from vbp.recipes.run import run
from vbp.report.run_report import RunReport
from vbp.runtime.processes import launched

PREPROCESSING_OVERRIDES: Final[Mapping[str, Any]] = {
    name: getattr(PREPROCESSING, name) for name in ("crop_pct", "interpolation", "mean", "std")
}

# The published rate suits 10 epochs of ImageNet, 200,000 steps; here there are 75.
_TUNING: Final[Mapping[str, Any]] = {"lr_ft": 5e-4, "use_kd": True}


def demo_run_config(demo: DemoConfig) -> RunConfig:
    """Return the configuration of the demo's run."""
    return RunConfig(
        data_path=str(demo.folder / "data"),
        model_type="vit",
        model_name=MODEL_NAME,
        model_kwargs=dict(MODEL_KWARGS),
        checkpoint=WEIGHTS,
        **PREPROCESSING_OVERRIDES,
        keep_ratio=demo.keep_ratio,
        criterion=demo.criterion,
        compensation=demo.compensation,
        global_pruning=demo.criterion != "auto",
        compare_uncompensated=True,
        epochs_ft=demo.epochs_ft,
        **(_TUNING if demo.epochs_ft > 0 else {}),
        hflip=HFLIP,
        crop_scale=CROP_SCALE,
        num_workers=0,
        device=demo.device,
        seed=demo.seed,
        save_dir=demo.folder / "run",
        overwrite=True,
    )


def load_demo(folder: Path | str) -> tuple[Classifier, ImageLoader, ImageLoader]:
    """Return the demo's classifier, its calibration images and its validation images, to try the library with."""
    write_digits(Path(folder))
    classifier = load_classifier(MODEL_NAME, checkpoint=WEIGHTS, model_kwargs=MODEL_KWARGS, **PREPROCESSING_OVERRIDES)
    transform = evaluation_transform(classifier.preprocessing)
    train, val = (
        make_loader(
            list_images(Path(folder), split, classifier.num_classes, classifier.class_names),
            transform,
            batch_size=128,
            num_workers=0,
        )
        for split in get_args(Split)
    )
    return classifier, train, val


def run_demo(demo: DemoConfig) -> RunReport:
    """Write the digits as an ImageFolder and run the recipe on them."""
    world = launched().world
    if world > 1:
        raise InputError(
            f"the demo is one process, got torchrun with {world}; start vbp demo without it, or vbp run under it"
        )
    write_digits(demo.folder / "data")
    return run(demo_run_config(demo))
