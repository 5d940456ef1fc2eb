"""Train the demo's small ViT on the handwritten digits and save its weights: two minutes on two cores.

python examples/train_digits_vit.py
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import sklearn
import timm
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save
from torch import nn
from tqdm import trange

from vbp.data import digits
from vbp.data.data_path import list_images
from vbp.data.images import Split
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import evaluation_transform, training_transform
from vbp.runtime.files import write_bytes
from vbp.training.evaluate import Accuracy, evaluate


@dataclass(frozen=True)
class TrainConfig:
    """Train the demo's small ViT on scikit-learn's handwritten digits."""

    data_path: Path = Path("output/digits")
    """Where the digits are written as an ImageFolder, if they are not there."""
    output: Path = digits.WEIGHTS
    """The weight file to write, by default the one that the package carries."""
    epochs: int = 80
    """Passes over the training split."""
    warmup_epochs: int = 5
    """Epochs in which the learning rate rises to its peak; a cosine to 0 follows."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    batch_size: int = 64
    """Images in a batch."""
    seed: int = 0
    """Seed of the weights, the order and the augmentation."""


def loader(config: TrainConfig, split: Split) -> ImageLoader:
    """Load the training split with random crops, the validation split with the evaluation transform."""
    training = split == "train"
    transform = (
        training_transform(digits.PREPROCESSING, hflip=digits.HFLIP, scale=digits.CROP_SCALE)
        if training
        else evaluation_transform(digits.PREPROCESSING)
    )
    images = list_images(config.data_path, split, digits.MODEL_KWARGS["num_classes"])
    return make_loader(
        images, transform, batch_size=config.batch_size, num_workers=0, shuffle=training, seed=config.seed
    )


def train(config: TrainConfig) -> nn.Module:
    """Train from random weights and return those of the last epoch: `val` must not choose among epochs."""
    torch.manual_seed(config.seed)
    # timm's default initialisation has a standard deviation of 0.02 at any width. At 64 that leaves the MLPs nearly
    # unused: half of their channels could go unnoticed. "jax" (Xavier) scales with the width of the layer.
    model: nn.Module = timm.create_model(digits.MODEL_NAME, **digits.MODEL_KWARGS, weight_init="jax")
    batches = loader(config, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    warmup, steps = config.warmup_epochs * len(batches), config.epochs * len(batches)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for epoch in trange(config.epochs, unit="epoch", disable=None):
        batches.set_epoch(epoch)
        for pixels, labels in batches:
            loss = F.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
    return model.eval()


def record(config: TrainConfig, accuracy: Accuracy) -> dict[str, str]:
    """Return what the weight file says about itself: its content, and the command that made it."""
    names = ("epochs", "warmup_epochs", "lr", "weight_decay", "batch_size", "seed")
    flags = " ".join(f"--{name} {getattr(config, name)}" for name in names)
    values = {
        "model": digits.MODEL_NAME,
        "model_kwargs": dict(digits.MODEL_KWARGS),
        "preprocessing": digits.PREPROCESSING.to_dict(),
        "data": "scikit-learn load_digits, every second image of each digit held back as val",
        "val": {"images": accuracy.images, "correct": accuracy.correct1, "top1": round(accuracy.top1, 2)},
        "command": f"python examples/train_digits_vit.py {flags}",
        "versions": {"python": platform.python_version()}
        | {module.__name__: str(module.__version__) for module in (torch, timm, sklearn)},
    }
    # One entry: safetensors writes several in any order, and the same run would give other bytes each time.
    return {"training": json.dumps(values)}


def main() -> None:
    """Write the digits, train, evaluate and save."""
    config = tyro.cli(TrainConfig, config=(tyro.conf.FlagCreatePairsOff,), use_underscores=True)
    digits.write_digits(config.data_path)
    model = train(config)
    accuracy = evaluate(model, loader(config, "val"), "cpu")
    write_bytes(config.output, save(model.state_dict(), metadata=record(config, accuracy)))
    print(f"val top-1 {accuracy.top1:.2f} % of {accuracy.images} images; weights in {config.output}")


if __name__ == "__main__":
    main()
