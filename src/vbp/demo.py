"""The main job on an embedded default: handwritten digits and a small ViT that the package carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vbp.config import RunConfig
from vbp.digits import CROP_SCALE, HFLIP, MODEL_KWARGS, MODEL_NAME, PREPROCESSING, WEIGHTS, write_digits
from vbp.recipe import run
from vbp.report import RunReport


@dataclass(frozen=True)
class DemoConfig:
    """Prune a small ViT on scikit-learn's handwritten digits: no download, no GPU, about a minute."""

    folder: Path = Path("./output/demo")
    """Digits go to data/ in it, results to run/, where those of an earlier demo are replaced."""
    keep_ratio: float = 0.5
    """Share of the hidden MLP channels to keep, in (0, 1]."""
    epochs_ft: int = 5
    """Epochs of fine-tuning; 0 only prunes."""
    seed: int = 0
    """Seed of order and augmentation."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N; the model is too small to gain from a GPU."""


def demo_run_config(demo: DemoConfig) -> RunConfig:
    """Give the configuration of the run that the demo is."""
    return RunConfig(
        data_path=demo.folder / "data",
        model_type="vit",
        model_name=MODEL_NAME,
        model_kwargs=dict(MODEL_KWARGS),
        checkpoint=WEIGHTS,
        crop_pct=PREPROCESSING.crop_pct,
        interpolation=PREPROCESSING.interpolation,
        mean=PREPROCESSING.mean,
        std=PREPROCESSING.std,
        keep_ratio=demo.keep_ratio,
        global_pruning=True,
        compare_uncompensated=True,
        epochs_ft=demo.epochs_ft,
        # The published rate suits 10 epochs of ImageNet, 200,000 steps; here there are 75.
        lr_ft=5e-4,
        use_kd=True,
        hflip=HFLIP,
        crop_scale=CROP_SCALE,
        num_workers=0,
        device=demo.device,
        seed=demo.seed,
        save_dir=demo.folder / "run",
        overwrite=True,
    )


def run_demo(demo: DemoConfig) -> RunReport:
    """Write the digits as an ImageFolder and run the recipe on them."""
    write_digits(demo.folder / "data")
    return run(demo_run_config(demo))
