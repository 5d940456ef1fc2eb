"""Prune without training: the accuracy with the mean shift, and with the closed-form refit.

    python examples/prune_without_training.py

Both remove the same channels; only the compensation differs. docs/refit.md explains it. The default is the package's
small ViT on handwritten digits: no download, some seconds on a CPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import vbp
from vbp.recipes.demo import load_demo


@dataclass(frozen=True)
class Options:
    """Compare mean shift and refit."""

    data_path: Path = Path("output/digits")
    """Where the digits are written, if they are not there."""
    keep_ratios: tuple[float, ...] = (0.8, 0.65, 0.5, 0.35)
    """Shares of the hidden channels to keep."""


def main(options: Options) -> None:
    """Prune a copy for each ratio, both ways."""
    torch.manual_seed(0)
    classifier, calibration, val_loader = load_demo(options.data_path)
    val = list(val_loader)  # small enough to stay in memory
    dense = classifier.model
    sites = vbp.find_sites(dense, classifier.example_input())
    statistics = vbp.collect_statistics(dense, sites, calibration, covariance=True)
    scores = vbp.output_variance_scores(dense, sites, statistics)

    print(f"dense {vbp.evaluate(dense, val, 'cpu').top1:.2f} % top-1\nkeep   mean shift   refit")
    for keep_ratio in options.keep_ratios:
        plan = vbp.make_plan(sites, scores, keep_ratio=keep_ratio)
        shifted, refitted = copy.deepcopy(dense), copy.deepcopy(dense)
        vbp.prune_(shifted, plan, statistics.means)
        vbp.prune_(refitted, plan, statistics.means, statistics.covariances)
        accuracies = [vbp.evaluate(model, val, "cpu").top1 for model in (shifted, refitted)]
        print(f"{keep_ratio:<6g} {accuracies[0]:8.2f} % {accuracies[1]:7.2f} %")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
