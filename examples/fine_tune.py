"""Prune a model and fine-tune it with the dense one as teacher, with the functions that `vbp run` uses.

    python examples/fine_tune.py

The default is the package's small ViT on handwritten digits: no download, some seconds on a CPU. For a model of your
own replace `load_demo` by `vbp.load_classifier(...)` and `vbp.list_images(...)`.
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
    """Prune and fine-tune."""

    data_path: Path = Path("output/digits")
    """Where the digits are written, if they are not there."""
    keep_ratio: float = 0.5
    """Share of the hidden channels to keep."""
    epochs: int = 3
    """Passes over the training images."""
    lr: float = 5e-4
    """Peak learning rate; on ImageNet the paper takes 1.5e-5 and 10 epochs."""
    output: Path = Path("output/fine_tuned")
    """Folder for the pruned model."""


def main(options: Options) -> None:
    """Prune, fine-tune, save."""
    torch.manual_seed(0)
    classifier, calibration, val_loader = load_demo(options.data_path)
    val = list(val_loader)  # small enough to stay in memory
    model, device = classifier.model, torch.device("cpu")
    teacher = copy.deepcopy(model)

    sites = vbp.find_sites(model, classifier.example_input())
    statistics = vbp.collect_statistics(model, sites, calibration)
    plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=options.keep_ratio)
    vbp.prune_(model, plan, statistics.means)
    print(f"dense   {vbp.evaluate(teacher, val, device).top1:6.2f} % top-1")
    print(f"pruned  {vbp.evaluate(model, val, device).top1:6.2f} % top-1")

    # Mirrored digits are other characters; leave hflip out for photographs.
    transform = vbp.training_transform(classifier.preprocessing, hflip=False, scale=(0.7, 1.0))
    train = vbp.make_loader(calibration.images, transform, batch_size=64, num_workers=0, shuffle=True)
    settings = vbp.TrainerSettings(steps=options.epochs * len(train), learning_rate=options.lr)
    trainer = vbp.Trainer(model, settings, device=device, teacher=teacher)
    for epoch in range(1, options.epochs + 1):
        result = trainer.train_epoch(train, epoch)
        accuracy = vbp.evaluate(trainer.evaluated, val, device)
        print(f"epoch {epoch} {accuracy.top1:6.2f} % top-1, loss {result.loss:.3f}")

    vbp.save_pruned(
        model,
        options.output,
        plans=plan,
        source=classifier.source,
        preprocessing=classifier.preprocessing,
        metrics={"top1": round(accuracy.top1, 2)},
    )
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
