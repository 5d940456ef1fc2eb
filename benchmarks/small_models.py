"""Train small models of several families and recipes on handwritten digits, prune each without training, and compare.

    python benchmarks/small_models.py --save output/small_models

Prints what is left of each model's top-1 right after pruning, with the mean KL(dense || pruned) on the same
validation images: by the paper's rule, by equal shares, and by the criterion auto as `vbp run` uses it by default
on a CPU. Each validation image is judged at nine places, shifted by up to two of its 32 pixels, as the models were
trained to see them: where all rules are within a few answers of the dense model, one place would tell little.
Says at the end where auto is below another rule, by how many answers, and where a rule collapses. Nothing is
downloaded: the digits are scikit-learn's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import timm
import torch
import torch.nn.functional as F
import tyro
from judging import Judge, Verdict
from small_training import RECIPES, Images, load, trained
from torch import Tensor, nn

import vbp
from vbp.data import digits
from vbp.method.elimination import Elimination
from vbp.method.sampling import RandomProbes, TokenSample
from vbp.pruning.auto import sensitivity_eliminations
from vbp.pruning.criteria import eliminations
from vbp.pruning.divergence import HELD_OUT_IMAGES
from vbp.recipes.options import COVARIANCE_TOKENS
from vbp.refit.refits import Refits
from vbp.statistics.images import GivenImages

# The first batch gives the pivots of the sensitivity: `vbp run` takes 32 images too.
_BATCH: Final = 32
# Pixels by which validation images are shifted: training shifts by up to 2.4.
_SHIFT: Final = 2


@dataclass(frozen=True)
class Options:
    """Train small models and compare training-free rules on them."""

    models: tuple[str, ...] = ("vit", "vit_deep", "vit_massive", "convnext", "swin")
    """Which of them."""
    ratios: tuple[float, ...] = (0.95, 0.8, 0.65, 0.5, 0.4, 0.3, 0.15)
    """Shares of the hidden channels to keep."""
    save: Path | None = None
    """Folder in which weights are kept for the next time."""
    seed: int = 0
    """Of weights, training, and the sums over calibration images."""
    data_path: Path = Path("output/digits")
    """Where the digits are written as images, if they are not there."""


def _batches(pixels: Tensor) -> tuple[Tensor, ...]:
    return torch.split(pixels, _BATCH)


def bordered(images: Images) -> list[tuple[Tensor, Tensor]]:
    """Return batches of images with a border to shift them over, and their labels."""
    padded = F.pad(images.pixels, (_SHIFT,) * 4, mode="replicate")
    return list(zip(_batches(padded), torch.split(images.labels, _BATCH), strict=True))


class Bench:
    """A dense model, its statistics, and the rules that are compared."""

    def __init__(self, model: nn.Module, train: Images, val: Images, seed: int, *, convolutions: bool) -> None:
        """Collect what the rules need, over all training images."""
        self.model = model
        self.batches = _batches(train.pixels)
        self.sites = vbp.find_sites(model, train.pixels[:1], convolutions=convolutions)
        self.statistics = vbp.collect_statistics(
            model, self.sites, self.batches, covariance=True,
            tokens=TokenSample(COVARIANCE_TOKENS, seed=seed), sensitivity=RandomProbes(seed=seed),
        )  # fmt: skip
        self.reference = vbp.DenseReference(model, _batches(train.pixels[:HELD_OUT_IMAGES]))
        # Where the model ends in no linear layer, this stays as it is, as in a run.
        self.refits = Refits(model, self.sites, train.pixels[:1], GivenImages(self.batches))
        self.judge = Judge(model, bordered(val), shift=_SHIFT)

    @cached_property
    def orders(self) -> Mapping[str, Elimination]:
        """Return the order of auto in each site, which is the same at all ratios."""
        return sensitivity_eliminations(self.model, self.sites, self.statistics)

    @cached_property
    def plain_scores(self) -> Mapping[str, Tensor]:
        """Return the scores of elimination in the plain covariance."""
        found = eliminations(self.model, self.sites, self.statistics)
        return {name: one.scores for name, one in found.items()}

    def paper(self, ratio: float) -> nn.Module:
        """Prune as the paper does: variances of all sites together, and the mean shift."""
        model = copy.deepcopy(self.model)
        plan = vbp.make_plan(self.sites, vbp.variance_scores(self.statistics), keep_ratio=ratio)
        vbp.prune_(model, plan, self.statistics.means)
        return model

    def equal_shares(self, ratio: float) -> nn.Module:
        """Prune each site alike, by elimination in the plain covariance, with the refit."""
        model = copy.deepcopy(self.model)
        plan = vbp.make_plan(self.sites, self.plain_scores, keep_ratio=ratio, scope="per_layer")
        vbp.prune_(model, plan, self.statistics.means, self.statistics.covariances)
        return model

    def auto(self, ratio: float) -> nn.Module:
        """Prune by the criterion auto, then refit producers, residual stream and last layer, as a run does."""
        found = vbp.auto_plan(
            self.model, self.sites, self.statistics, self.reference, keep_ratio=ratio, orders=self.orders
        )
        model = copy.deepcopy(self.model)
        vbp.prune_(model, found.plan, found.means, found.covariances)
        self.refits.refit_(model, plan=found.plan)
        return model


PAPER, EQUAL, AUTO = "paper", "equal shares", "`auto`"
RULES: Final[Mapping[str, Callable[[Bench, float], nn.Module]]] = {
    PAPER: Bench.paper,
    EQUAL: Bench.equal_shares,
    AUTO: Bench.auto,
}


@dataclass(frozen=True)
class Cell:
    """All rules on one model at one ratio."""

    judge: Judge
    verdicts: Mapping[str, Verdict]

    def correct(self, rule: str) -> tuple[int, int]:
        """Return a rule's right answers: of the images at all places, and as they stand."""
        right = self.verdicts[rule].right
        return int(right.sum()), int(right[:, 0].sum())


# By model and ratio.
Results = dict[tuple[str, float], Cell]


def compared(name: str, train: Images, val: Images, options: Options) -> Results:
    """Train a model, prune it by all rules at all ratios, and say what came of it."""
    label = RECIPES[name].label
    dense = trained(name, train, options.save, options.seed)
    bench = Bench(dense, train, val, options.seed, convolutions=RECIPES[name].convolutions)
    print(f"{label}: dense top-1 {bench.judge.accuracy:.2%}, {int(bench.judge.right.sum())} right", flush=True)
    found: Results = {}
    for ratio in options.ratios:
        start = time.perf_counter()
        cell = Cell(bench.judge, {rule: bench.judge(make(bench, ratio)) for rule, make in RULES.items()})
        right = ", ".join("{} {} ({})".format(rule, *cell.correct(rule)) for rule in RULES)
        print(f"{label} at {ratio}: {right} right; {time.perf_counter() - start:.0f} s", flush=True)
        found[label, ratio] = cell
    return found


def table(found: Results, ratios: Iterable[float]) -> str:
    """Return a Markdown table with one line for each model and rule."""
    lines = [f"| model | rule | {' | '.join(map(str, ratios))} |", "|---|---|" + "---|" * len(tuple(ratios))]
    for label in dict.fromkeys(label for label, _ in found):
        for rule in RULES:
            verdicts = [found[label, ratio].verdicts[rule] for ratio in ratios]
            cells = " | ".join(f"{one.relative:.3f} ({one.divergence:.4f})" for one in verdicts)
            lines.append(f"| {label} | {rule} | {cells} |")
    return "\n".join(lines)


def deficits(found: Results, rule: str) -> str:
    """Say where auto has fewer right answers than a rule, by how many, and where its KL is higher."""
    right, standing, farther = [], [], []
    for (label, ratio), cell in found.items():
        ours, theirs = cell.verdicts[AUTO], cell.verdicts[rule]
        more, more_standing = (b - a for a, b in zip(cell.correct(AUTO), cell.correct(rule), strict=True))
        if more > 0:
            share, error = cell.judge.difference(ours, theirs)
            right.append(f"{label} at {ratio} by {more} ({share:+.5f} ± {error:.5f} of the dense top-1)")
        if more_standing > 0:
            standing.append(f"{label} at {ratio} by {more_standing}")
        if ours.divergence > theirs.divergence:
            farther.append(f"{label} at {ratio}")
    return (
        f"auto below {rule}, in answers: {'; '.join(right) or 'nowhere'}\n"
        f"auto below {rule}, in answers to the images as they stand: {'; '.join(standing) or 'nowhere'}\n"
        f"auto with a higher KL than {rule}: {'; '.join(farther) or 'nowhere'}"
    )


def collapses(found: Results) -> str:
    """Return which rule keeps less than half of the accuracy where equal shares keeps more than 0.8."""
    places = [
        f"{rule} on {label} at {ratio}: {verdict.relative:.3f}"
        for (label, ratio), cell in found.items()
        for rule, verdict in cell.verdicts.items()
        if verdict.relative < 0.5 and cell.verdicts[EQUAL].relative > 0.8
    ]
    return f"collapses, below 0.5 where equal shares is above 0.8: {'; '.join(places) or 'none'}"


def main(options: Options) -> None:
    """Train, prune, and print the table."""
    if unknown := set(options.models) - set(RECIPES):
        raise vbp.InputError(f"models must be among {', '.join(RECIPES)}, got {', '.join(sorted(unknown))}")
    digits.write_digits(options.data_path)
    train, val = (load(options.data_path, split, options.seed) for split in ("train", "val"))
    found: Results = {}
    for name in options.models:
        found |= compared(name, train, val, options)
    print(
        f"\n{len(train.labels)} calibration images, {len(val.labels)} validation images at nine places each; "
        "share of the dense top-1 (KL)"
    )
    print(f"torch {torch.__version__}, timm {timm.__version__}, vbp {vbp.__version__}\n")
    print(table(found, options.ratios))
    print(f"\n{deficits(found, PAPER)}\n{deficits(found, EQUAL)}\n{collapses(found)}")


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
