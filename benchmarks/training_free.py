"""What is left of a model's accuracy right after pruning, without training: rules by ratios.

    python benchmarks/training_free.py --data ../imagenet --checkpoint deit_tiny.safetensors

Statistics are collected once, over all calibration images; every row is pruned from the dense model and evaluated on
all validation images, with `--shift` on each at nine places, and on all images of other folders (`--judges`). Prints
for each of these a Markdown table: top-1 relative to the dense model's, the share of the answers that are the dense
model's class, and the mean KL(dense || pruned); and how far each rule is above the first one, paired by image. Where
rules are a few images apart, only this tells whether that is more than scatter.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import timm
import torch
import tyro
from judging import Judge, Verdict
from torch import Tensor, nn

import vbp
from vbp.data.folder import ImageList
from vbp.method.sampling import RandomProbes, TokenSample
from vbp.pruning.auto import auto_plan, sensitivity_eliminations
from vbp.pruning.criteria import eliminations
from vbp.pruning.plan import PlanChoice
from vbp.recipes.options import COVARIANCE_TOKENS
from vbp.refit.refits import Refit, Refits
from vbp.runtime.choices import Scope
from vbp.statistics.images import GivenImages

Rule = Literal[
    "paper", "variance", "output variance", "elimination", "equal shares",
    "auto", "auto, head", "auto, producers", "auto, stream", "auto, stream, head",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A model, and images to calibrate and to judge it."""

    data: Path
    """Folder with train and val, each with one folder for each class."""
    model_name: str = "deit_tiny_patch16_224"
    """A timm model."""
    checkpoint: Path | None = None
    """Its weights; by default those that timm names."""
    calibration: int = 1000
    """Calibration images, balanced over the classes."""
    held_out: int = 256
    """Those of them on which auto compares plans."""
    batch_size: int = 25
    """Images in a batch."""
    device: str = "cpu"
    """Where to run."""


@dataclass(frozen=True)
class Options(Setting):
    """Compare training-free rules."""

    ratios: tuple[float, ...] = (0.65, 0.5, 0.4)
    """Shares of the hidden channels to keep."""
    rules: tuple[Rule, ...] = get_args(Rule)
    """What to compare."""
    round_to: int = 1
    """Step of the channel counts."""
    stats_path: Path | None = None
    """Where statistics are kept for the next time."""
    shift: int = 0
    """Pixels by which each validation image is shifted to be judged at nine places; 0 judges it as it stands."""
    judges: tuple[Path, ...] = ()
    """Other folders, whose images, of train and val, are judged too."""


class Dense:
    """The dense model, and how far pruned ones fall behind it on the validation images."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.classifier = vbp.load_classifier(setting.model_name, checkpoint=setting.checkpoint)
        self.model = self.classifier.model.to(setting.device).eval()
        self.sites = vbp.find_sites(self.model, self.classifier.example_input().to(setting.device))
        self.val = self.images("val")

    @cached_property
    def judge(self) -> Judge:
        """Return what judges by the validation images as they stand."""
        return Judge(self.model, self.read(self.val))

    def images(self, split: Literal["train", "val"], folder: Path | None = None) -> ImageList:
        """List a split, by default of the data."""
        names, classes = self.classifier.class_names, self.classifier.num_classes
        return vbp.list_images(folder or self.setting.data, split, classes, names)

    def read(self, images: ImageList, border: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Decode images into memory, with a border of more pixels around the crop."""
        whole = self.classifier.preprocessing
        if border:
            height, width = whole.img_size
            grown = height + 2 * border, width + 2 * border
            # The crop grows as the input does, so that the images are resized as before.
            whole = replace(whole, img_size=grown, crop_pct=whole.crop_pct * grown[0] / whole.img_size[0])
        loader = vbp.make_loader(
            images, vbp.evaluation_transform(whole), batch_size=self.setting.batch_size, num_workers=0
        )
        return list(loader)


class Bench(Dense):
    """The dense model, its statistics, and what rules need of them."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options
        self.judges = self._judges()
        images = vbp.balanced_subset(self.images("train"), options.calibration, 0)
        train = [pixels for pixels, _ in self.read(images)]
        self.statistics = self._statistics(train)
        start = time.perf_counter()
        self.orders = sensitivity_eliminations(self.model, self.sites, self.statistics)
        print(f"elimination: {time.perf_counter() - start:.1f} s", flush=True)
        self.choices: dict[float, PlanChoice] = {}
        self.refits = Refits(self.model, self.sites, self.classifier.example_input(), GivenImages(train))
        # The first ones judge, as in `vbp sweep`: the order is balanced over the classes.
        judging = torch.cat(train)[: options.held_out]
        self.reference = vbp.DenseReference(self.model, torch.split(judging, options.batch_size))

    def _judges(self) -> dict[str, Judge]:
        """Return all that judge, by what their images are called."""
        if shift := self.options.shift:
            own = Judge(self.model, self.read(self.val, shift), shift=shift)
            found = {"validation images at nine places": own}
        else:
            found = {"validation images": self.judge}
        for folder in self.options.judges:
            batches = [batch for split in ("train", "val") for batch in self.read(self.images(split, folder))]
            found[f"images of {folder.name}"] = Judge(self.model, batches)
        return found

    def _statistics(self, train: list[Tensor]) -> vbp.Statistics:
        path = self.options.stats_path
        if path is not None and path.exists():
            return vbp.Statistics.load(path)
        start = time.perf_counter()
        found = vbp.collect_statistics(
            self.model, self.sites, train,
            covariance=True, tokens=TokenSample(COVARIANCE_TOKENS), sensitivity=RandomProbes(),
        )  # fmt: skip
        print(f"statistics, covariance and sensitivity: {time.perf_counter() - start:.1f} s", flush=True)
        if path is not None:
            found.save(path)
        return found

    def plan(self, scores: dict[str, Tensor], ratio: float, scope: Scope = "global") -> vbp.PruningPlan:
        """Make a plan."""
        return vbp.make_plan(
            self.sites,
            scores,
            keep_ratio=ratio,
            scope=scope,
            round_to=self.options.round_to,
        )

    def refitted(self, scores: dict[str, Tensor], ratio: float, scope: Scope = "global") -> nn.Module:
        """Prune by these scores, with the plain refit."""
        model = copy.deepcopy(self.model)
        vbp.prune_(model, self.plan(scores, ratio, scope), self.statistics.means, self.statistics.covariances)
        return model

    def paper(self, ratio: float) -> nn.Module:
        """Prune as the paper does: variance and mean shift."""
        model = copy.deepcopy(self.model)
        vbp.prune_(model, self.plan(vbp.variance_scores(self.statistics), ratio), self.statistics.means)
        return model

    def elimination(self, ratio: float, scope: Scope = "global") -> nn.Module:
        """Prune by greedy elimination in the plain covariance."""
        found = eliminations(self.model, self.sites, self.statistics)
        return self.refitted({name: one.scores for name, one in found.items()}, ratio, scope)

    def auto(self, ratio: float) -> nn.Module:
        """Prune by the criterion auto."""
        if ratio not in self.choices:
            start = time.perf_counter()
            choice = auto_plan(
                self.model, self.sites, self.statistics, self.reference,
                keep_ratio=ratio, round_to=self.options.round_to, orders=self.orders,
            )  # fmt: skip
            print(f"auto at {ratio}: {time.perf_counter() - start:.1f} s\n{choice.table()}", flush=True)
            print([len(entry.keep) for entry in choice.plan.sites], flush=True)
            self.choices[ratio] = choice
        choice = self.choices[ratio]
        model = copy.deepcopy(self.model)
        vbp.prune_(model, choice.plan, choice.means, choice.covariances)
        return model

    def refitted_auto(self, ratio: float, *refits: Refit) -> nn.Module:
        """Prune by the criterion auto, then refit to the dense model."""
        model = self.auto(ratio)
        start = time.perf_counter()
        done = self.refits.refit_(model, refits)
        print(f"{', '.join(refits)} at {ratio}: {time.perf_counter() - start:.1f} s, {done}", flush=True)
        return model


def main(options: Options) -> None:
    """Print the table."""
    bench = Bench(options)
    rules: dict[Rule, Callable[[float], nn.Module]] = {
        "paper": bench.paper,
        "variance": lambda ratio: bench.refitted(vbp.variance_scores(bench.statistics), ratio),
        "output variance": lambda ratio: bench.refitted(
            vbp.output_variance_scores(bench.model, bench.sites, bench.statistics), ratio
        ),
        "elimination": bench.elimination,
        "equal shares": lambda ratio: bench.elimination(ratio, "per_layer"),
        "auto": bench.auto,
        "auto, head": lambda ratio: bench.refitted_auto(ratio, "head"),
        "auto, producers": lambda ratio: bench.refitted_auto(ratio, "producers"),
        "auto, stream": lambda ratio: bench.refitted_auto(ratio, "producers", "stream"),
        "auto, stream, head": lambda ratio: bench.refitted_auto(ratio, "producers", "stream", "head"),
    }
    verdicts: dict[tuple[str, float], dict[str, Verdict]] = {}
    for name in options.rules:
        for ratio in options.ratios:
            model = rules[name](ratio)
            verdicts[name, ratio] = {images: judge(model) for images, judge in bench.judges.items()}
            for images, one in verdicts[name, ratio].items():
                print(f"{name} at {ratio}, {images}: {_cell(one)}", flush=True)
    print(
        f"{options.model_name}, {platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, timm {timm.__version__}, {datetime.now(UTC).date()}"
    )
    for judged, judge in bench.judges.items():
        print(f"\n{len(judge.labels)} {judged}, dense top-1 {100 * judge.accuracy:.2f} %")
        of_judge = {key: found[judged] for key, found in verdicts.items()}
        print(_table(options, {key: _cell(one) for key, one in of_judge.items()}))
        print(f"\nAbove {options.rules[0]}, in relative top-1, with the standard error")
        first = {ratio: of_judge[options.rules[0], ratio] for ratio in options.ratios}
        print(_table(options, {key: _above(judge, one, first[key[1]]) for key, one in of_judge.items()}))


def _cell(one: Verdict) -> str:
    return f"{one.relative:.3f}, {one.agreement:.3f} ({one.divergence:.3f})"


def _above(judge: Judge, ours: Verdict, theirs: Verdict) -> str:
    share, error = judge.difference(ours, theirs)
    return f"{share:+.4f} ± {error:.4f}"


def _table(options: Options, cells: dict[tuple[str, float], str]) -> str:
    lines = [f"| rule | {' | '.join(f'keep {ratio}' for ratio in options.ratios)} |"]
    lines.append("|---|" + "---|" * len(options.ratios))
    lines += [f"| {rule} | {' | '.join(cells[rule, ratio] for ratio in options.ratios)} |" for rule in options.rules]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
