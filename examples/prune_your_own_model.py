"""Train your own network in plain PyTorch, prune it, fine-tune it for two epochs, save it and load it again.

    python examples/prune_your_own_model.py

The network needs no registration, and the images are tensors in memory: scikit-learn's handwritten digits. It takes
some seconds on a CPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vbp


@dataclass(frozen=True)
class Options:
    """Prune a network of your own."""

    keep_ratio: float = 0.4
    """Share of the hidden channels to keep."""
    epochs: int = 12
    """Passes over the images to train the dense network."""
    epochs_ft: int = 2
    """Passes over the images to fine-tune the pruned one."""
    output: Path = Path("output/pruned_own_model")
    """Folder for the pruned model."""


class Block(nn.Module):
    """An MLP with a residual connection: `expand` makes the hidden channels, `reduce` reads them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.reduce = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the output of the MLP to its input."""
        out: Tensor = x + self.reduce(F.gelu(self.expand(self.norm(x))))
        return out


class DigitNetwork(nn.Module):
    """Read an 8 x 8 image as 64 numbers, and return the logits of the ten digits."""

    def __init__(self, width: int = 64, hidden: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten digits."""
        logits: Tensor = self.head(self.blocks(self.embed(images.flatten(1))))
        return logits


def digit_batches() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Return training and validation batches of (images, labels)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, val = order[:1200], order[1200:]
    return [(images[part], labels[part]) for part in train.split(64)], [(images[val], labels[val])]


def train_(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int, lr: float, teacher: nn.Module | None = None
) -> None:
    """Train in place, with the dense network as teacher if there is one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    distillation = vbp.DistillationLoss()
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            logits = model(images)
            if teacher is None:
                loss = F.cross_entropy(logits, labels)
            else:
                with torch.no_grad():
                    target = teacher(images)
                loss = distillation(logits, target, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def main(options: Options) -> None:
    """Train, prune, fine-tune, save, load."""
    torch.manual_seed(0)
    train, val = digit_batches()
    model = DigitNetwork()
    train_(model, train, options.epochs, lr=2e-3)
    dense = copy.deepcopy(model)
    print(f"dense   {vbp.evaluate(model, val, 'cpu').top1:6.2f} % top-1")

    example = val[0][0][:1]
    sites = vbp.find_sites(model, example)
    statistics = vbp.collect_statistics(model, sites, train)
    plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=options.keep_ratio)
    before, after = vbp.plan_cost(model, plan, example).params
    vbp.prune_(model, plan, statistics.means)
    print(f"pruned  {vbp.evaluate(model, val, 'cpu').top1:6.2f} % top-1, {before:,} -> {after:,} parameters")

    # Make the optimizer after pruning: the pruned layers have new parameters.
    train_(model, train, options.epochs_ft, lr=5e-4, teacher=dense)
    print(f"tuned   {vbp.evaluate(model, val, 'cpu').top1:6.2f} % top-1")

    vbp.save_pruned(model, options.output, plans=plan)
    loaded = vbp.load_pruned(options.output, model=DigitNetwork())
    with torch.no_grad():
        assert loaded(example).equal(model(example))
    print(f"saved in {options.output}; the loaded model has the same logits, bit for bit")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
