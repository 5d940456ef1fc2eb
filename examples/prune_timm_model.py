"""Prune any timm model, save it, load it again, and compare the logits.

    python examples/prune_timm_model.py
    python examples/prune_timm_model.py --model_name swin_tiny_patch4_window7_224 --keep_ratio 0.5
    python examples/prune_timm_model.py --checkpoint deit_tiny.safetensors --data_path /data/imagenet

Without a checkpoint the weights are random, without data the images are noise. This is enough to see that a model can
be pruned and what it will cost, but not for its accuracy. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import vbp


@dataclass(frozen=True)
class Options:
    """Prune a timm model."""

    model_name: str = "deit_tiny_patch16_224"
    """Any timm name."""
    checkpoint: Path | None = None
    """Its weights (.safetensors, .pth, .pt); random ones unless given."""
    data_path: Path | None = None
    """Folder with train/<class>/; noise unless given."""
    images: int = 16
    """Images for the statistics."""
    keep_ratio: float = 0.65
    """Share of the hidden channels to keep."""
    round_to: int = 8
    """Channel counts in multiples of this."""
    output: Path = Path("output/pruned_timm_model")
    """Folder for the pruned model."""


def calibration_images(options: Options, classifier: vbp.Classifier) -> Iterable[Any]:
    """Return batches of images, prepared as the model needs them."""
    if options.data_path is None:
        channels, size = len(classifier.preprocessing.mean), classifier.preprocessing.img_size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(options.images, channels, *size, generator=generator).split(8)
    images = vbp.list_images(options.data_path, "train", classifier.num_classes, classifier.class_names)
    chosen = vbp.balanced_subset(images, options.images, seed=0)
    return vbp.make_loader(chosen, vbp.evaluation_transform(classifier.preprocessing), batch_size=32, num_workers=2)


def main(options: Options) -> None:
    """Prune, save, load, compare."""
    torch.manual_seed(0)
    classifier = vbp.load_classifier(
        options.model_name, checkpoint=options.checkpoint, allow_random_init=options.checkpoint is None
    )
    model, example = classifier.model, classifier.example_input()

    sites = vbp.find_sites(model, example)
    statistics = vbp.collect_statistics(model, sites, calibration_images(options, classifier))
    scores = vbp.variance_scores(statistics)
    plan = vbp.make_plan(sites, scores, keep_ratio=options.keep_ratio, round_to=options.round_to)
    print(vbp.format_plan(plan, vbp.plan_cost(model, plan, example)))
    vbp.prune_(model, plan, statistics.means)

    vbp.save_pruned(
        model,
        options.output,
        plans=plan,
        source=classifier.source,
        preprocessing=classifier.preprocessing,
        class_names=classifier.class_names,
    )
    loaded = vbp.load_pruned(options.output)
    with torch.no_grad():
        assert loaded(example).equal(model(example))
    print(f"saved in {options.output}; the loaded model has the same logits, bit for bit")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
