"""Compare settings of `vbp.prune` at equal MACs, on small models of several families trained on handwritten digits.

    python benchmarks/small_budgets.py --save output/small_models
    python benchmarks/small_budgets.py --save output/small_models --compare cost_aware
    python benchmarks/small_budgets.py --save output/small_models --compare kernels

The models are those of `small_training.py`; both rules are `vbp.prune` with the criterion auto and `target_macs`, and
differ in one setting: MLPs alone or attention too, channels ranked by cost or by cost over the MACs that they save,
layers with larger kernels left after their refit by channels or refitted from patches. Prints the share of the dense
top-1, the mean KL(dense || pruned) in brackets, and where the second rule has fewer right answers than the first.
Each validation image is judged at nine places. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import torch
import tyro
from judging import Judge, Verdict
from small_models import bordered
from small_training import RECIPES, load, trained
from torch import Tensor, nn

import vbp
from vbp.cost.timing import hardware
from vbp.data import digits

_BATCH, _SHIFT = 32, 2
Comparison = Literal["attention", "cost_aware", "kernels"]


@dataclass(frozen=True)
class Pair:
    """Two rules that are compared, as settings of `vbp.prune`, and the models that can tell them apart."""

    rules: Mapping[str, Mapping[str, Any]]
    models: tuple[str, ...]


# Of Swin and MobileNetV2 the MLPs alone: what the ranking of attention gains is another comparison.
COMPARISONS: Final[Mapping[Comparison, Pair]] = {
    "attention": Pair(
        {"MLPs alone": {"attention": "off"}, "MLPs and attention": {}}, ("vit", "vit_deep", "vit_massive", "swin")
    ),
    "cost_aware": Pair(
        {
            "by cost": {"cost_aware": "off", "attention": "off"},
            "by cost over MACs": {"cost_aware": "on", "attention": "off"},
        },
        ("convnext", "swin", "mobilevit", "mobilenet", "resnet"),
    ),
    "kernels": Pair({"refit by channels": {"refit_kernels": "off"}, "and from patches": {}}, ("resnet",)),
}


@dataclass(frozen=True)
class Options:
    """Compare two rules at equal MACs on small models."""

    compare: Comparison = "attention"
    """What the rules differ in."""
    models: tuple[str, ...] = ()
    """Names of recipes; by default those that can tell the rules apart."""
    targets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)
    """Shares of the MACs."""
    save: Path | None = None
    """Folder in which weights are kept for the next time."""
    seed: int = 0
    """Of weights, training, and the sums over calibration images."""
    data_path: Path = Path("output/digits")
    """Where the digits are written as images, if they are not there."""


def pruned(dense: nn.Module, batches: tuple[Tensor, ...], settings: Mapping[str, Any]) -> nn.Module | None:
    """Prune by a budget of MACs; None where it is out of reach."""
    try:
        return vbp.prune(dense, batches, calib_samples=0, progress=False, **settings).model
    except vbp.InputError as error:
        if "must be from" not in str(error):
            raise
        return None


def main(options: Options) -> None:
    """Train, prune, and print the table."""
    digits.write_digits(options.data_path)
    train, val = (load(options.data_path, split, options.seed) for split in ("train", "val"))
    batches = torch.split(train.pixels, _BATCH)
    pair = COMPARISONS[options.compare]
    first, second = pair.rules
    told = f"torch {torch.__version__}, vbp {vbp.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    print(f"{hardware(torch.device('cpu'))}, {torch.get_num_threads()} threads, {told}\n")
    print(f"| model | rule | {' | '.join(map(str, options.targets))} |\n|---|---|{'---|' * len(options.targets)}")
    below: list[str] = []
    for name in options.models or pair.models:
        recipe = RECIPES[name]
        dense = trained(name, train, options.save, options.seed)
        judge = Judge(dense, bordered(val), shift=_SHIFT)
        found: dict[str, list[Verdict | None]] = {rule: [] for rule in pair.rules}
        for target in options.targets:
            budget = {"target_macs": target, "seed": options.seed, "convolutions": recipe.convolutions}
            for rule, settings in pair.rules.items():
                model = pruned(dense, batches, {**budget, **settings})
                found[rule].append(None if model is None else judge(model))
            one, other = (found[rule][-1] for rule in pair.rules)
            if one is not None and other is not None and int(other.right.sum()) < int(one.right.sum()):
                share, error = judge.difference(other, one)
                below.append(f"{recipe.label} at {target} by {-share:.5f} ± {error:.5f} of the dense top-1")
        for rule, verdicts in found.items():
            cells = ("-" if one is None else f"{one.relative:.3f} ({one.divergence:.5f})" for one in verdicts)
            print(f"| {recipe.label} | {rule} | {' | '.join(cells)} |", flush=True)
    print(f"\n{second} below {first}, in answers: {'; '.join(below) or 'nowhere'}")


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
