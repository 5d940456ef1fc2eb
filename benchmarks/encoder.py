"""What is left of a model's features right after pruning, without its head and without training.

    python benchmarks/encoder.py --data imagenet_mini --probe imagenette_mini --checkpoint deit_tiny.safetensors

The model is pruned with the features objective (`auto` with its refits) and by variance, with the same refits and
with the paper's mean shift, at each keep ratio. On the validation images of `--data`: the cosine of the pooled
features of the dense and the pruned model, and the share of the 10 nearest neighbours that both have in common. A
linear probe, scikit-learn's logistic regression on standardised features, learns from the training images of
`--probe` and is judged by its validation images: for each model on its own features. Prints a Markdown table.
"""

from __future__ import annotations

import platform
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import torch
import tyro
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import vbp
from vbp.data.data_path import list_unlabelled
from vbp.data.images import Images
from vbp.runtime.tables import format_count, markdown_table, with_error
from vbp.statistics.objective import Objective
from vbp.training.retrieval import compare_embeddings, embed

# How a plan is made: by the objective, by variance with the same refits, and the paper's rule.
RULES: Final[dict[str, dict[str, Any]]] = {
    "auto, features objective": {},
    "variance, refit": {"criterion": "variance", "global_pruning": True},
    "variance, mean shift (paper)": {"criterion": "variance", "compensation": "mean", "global_pruning": True},
}
STEPS: Final = 500


@dataclass(frozen=True)
class Options:
    """Compare plans for a model without its head."""

    data: Path
    """Folder with train and val: calibration, and images whose neighbours are compared; labels are not read."""
    probe: Path
    """Folder with train/<class>/ and val/<class>/, for the linear probe."""
    model_name: str = "deit_tiny_patch16_224"
    """A timm model."""
    checkpoint: Path | None = None
    """Its weights; by default those that timm names."""
    keep_ratios: tuple[float, ...] = (0.65, 0.5)
    """Shares of the hidden channels to keep."""
    calibration: int = 1000
    """Calibration images, taken evenly from all folders."""
    images: int = 0
    """Images of `--data` that are compared, and of each split of the probe; 0 takes all."""
    batch_size: int = 25
    """Images in a batch."""


class Bench:
    """A model without its head, and the images by which it and pruned ones are judged, in memory."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.encoder = vbp.load_classifier(
            options.model_name, checkpoint=options.checkpoint, model_kwargs={"num_classes": 0}
        )
        self.calibration = self._read(list_unlabelled(options.data, "train"), options.calibration)
        self.val = self._read(list_unlabelled(options.data, "val"), options.images)
        self.objective = Objective.of(self.encoder.model, self.calibration)
        self.dense = embed(self.encoder.model, self.objective, self.val, "cpu")
        self.probed = {split: self._probe_images(split) for split in ("train", "val")}

    def _read(self, images: Images, count: int) -> list[tuple[Tensor, Tensor]]:
        loader = vbp.make_loader(
            vbp.balanced_subset(images, count, 0),
            vbp.evaluation_transform(self.encoder.preprocessing),
            batch_size=self.options.batch_size,
            num_workers=0,
        )
        return list(loader)

    def _probe_images(self, split: Literal["train", "val"]) -> list[tuple[Tensor, Tensor]]:
        classes = sorted(path.name for path in (self.options.probe / split).iterdir() if path.is_dir())
        images = vbp.list_images(self.options.probe, split, len(classes), classes)
        return self._read(images, self.options.images)

    def retrieval(self, model: nn.Module) -> tuple[str, str]:
        """Return the cosine with the dense model's features, and the share of neighbours in common."""
        seen = compare_embeddings(self.dense, embed(model, self.objective, self.val, "cpu"))
        return f"{seen.cosine:.4f}", f"{seen.neighbours:.2f}"

    def probe(self, model: nn.Module) -> str:
        """Return the accuracy of a linear probe of a model's own features, with its standard error."""
        features = {
            split: embed(model, self.objective, batches, "cpu").rows for split, batches in self.probed.items()
        }
        labels = {split: torch.cat([labels for _, labels in batches]) for split, batches in self.probed.items()}
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS, C=0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(features["train"].numpy(), labels["train"].numpy())
        right = 100 * classifier.score(features["val"].numpy(), labels["val"].numpy())
        return with_error(right, len(labels["val"]))

    def row(self, keep_ratio: float, rule: str) -> list[str]:
        """Prune, and return a row of the table."""
        start = time.perf_counter()
        pruned = vbp.prune(self.encoder, self.calibration, keep_ratio=keep_ratio, progress=False, **RULES[rule])
        seconds = time.perf_counter() - start
        _, macs = pruned.cost.macs
        retrieval, probe = self.retrieval(pruned.model), self.probe(pruned.model)
        return [f"{keep_ratio:g}", rule, format_count(macs), *retrieval, probe, f"{seconds:.0f}"]


def main(options: Options) -> None:
    """Print the table, and where and when it was made."""
    bench = Bench(options)
    model = bench.encoder.model
    dense = format_count(vbp.count_macs(model, bench.encoder.example_input()))
    rows = [["1", "dense", dense, *bench.retrieval(model), bench.probe(model), ""]]
    for keep_ratio in options.keep_ratios:
        for rule in RULES:
            rows.append(bench.row(keep_ratio, rule))
            print(" | ".join(rows[-1]), flush=True)
    print(bench.objective.sentence())
    print(
        f"{len(bench.dense.rows)} images compared; probe on "
        + ", ".join(f"{sum(len(labels) for _, labels in batches)} {split}" for split, batches in bench.probed.items())
        + " images"
    )
    print(markdown_table(["keep", "plan", "MACs", "cosine", "neighbours %", "linear probe %", "seconds"], rows))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main(tyro.cli(Options))
