"""Compare one budget for MLPs and attention with MLPs alone, at equal MACs, on small models of several families.

    python benchmarks/small_budgets.py --save output/small_models

The models are those of `small_models.py`, trained on handwritten digits; both rules are `vbp.prune` with the
criterion auto and `target_macs`, with and without attention. Prints the share of the dense top-1, the mean
KL(dense || pruned) in brackets, and where the whole block has fewer right answers than MLPs alone. Nothing is
downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import tyro
from judging import Judge, Verdict
from small_models import bordered
from small_training import RECIPES, load, trained
from torch import nn

import vbp
from vbp.data import digits
from vbp.runtime.choices import Toggle

_BATCH, _SHIFT = 32, 2
_RULES: Final[dict[str, Toggle]] = {"MLPs alone": "off", "MLPs and attention": "auto"}


@dataclass(frozen=True)
class Options:
    """Compare budgets with and without attention on small models."""

    models: tuple[str, ...] = ("vit", "vit_deep", "vit_massive", "swin")
    """Which of them; ConvNeXt has no attention."""
    targets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)
    """Shares of the MACs."""
    save: Path | None = None
    """Folder in which weights are kept for the next time."""
    seed: int = 0
    """Of weights, training, and the sums over calibration images."""
    data_path: Path = Path("output/digits")
    """Where the digits are written as images, if they are not there."""


def pruned(
    dense: nn.Module, batches: tuple[torch.Tensor, ...], target: float, attention: Toggle, seed: int
) -> nn.Module | None:
    """Prune by a budget of MACs; None where it is out of reach."""
    try:
        return vbp.prune(
            dense, batches, target_macs=target, attention=attention, calib_samples=0, seed=seed, progress=False
        ).model
    except vbp.InputError as error:
        if "must be from" not in str(error):
            raise
        return None


def main(options: Options) -> None:
    """Train, prune, and print the table."""
    digits.write_digits(options.data_path)
    train, val = (load(options.data_path, split, options.seed) for split in ("train", "val"))
    batches = torch.split(train.pixels, _BATCH)
    print(f"torch {torch.__version__}, vbp {vbp.__version__}\n")
    print(f"| model | rule | {' | '.join(map(str, options.targets))} |\n|---|---|{'---|' * len(options.targets)}")
    below: list[str] = []
    for name in options.models:
        dense = trained(name, train, options.save, options.seed)
        judge = Judge(dense, bordered(val), shift=_SHIFT)
        found: dict[str, list[Verdict | None]] = {rule: [] for rule in _RULES}
        for target in options.targets:
            for rule, attention in _RULES.items():
                model = pruned(dense, batches, target, attention, options.seed)
                found[rule].append(None if model is None else judge(model))
            alone, both = (found[rule][-1] for rule in _RULES)
            if alone is not None and both is not None and int(both.right.sum()) < int(alone.right.sum()):
                share, error = judge.difference(both, alone)
                below.append(f"{RECIPES[name].label} at {target} by {-share:.5f} ± {error:.5f} of the dense top-1")
        for rule, verdicts in found.items():
            cells = ("-" if one is None else f"{one.relative:.3f} ({one.divergence:.4f})" for one in verdicts)
            print(f"| {RECIPES[name].label} | {rule} | {' | '.join(cells)} |", flush=True)
    print(f"\nMLPs and attention below MLPs alone, in answers: {'; '.join(below) or 'nowhere'}")


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
