"""Does a better starting point still help after training? Pruned models, tuned without labels or fine-tuned.

    python benchmarks/head_start.py --imagenet DATA --imagenette DATA --checkpoint deit_tiny.safetensors \
        --output output/starting_points

Starting points: the paper's rule with mean shift, the paper's rule with the refit, the criterion auto with all
refits, and channels at random with mean shift. Each is measured at several keep ratios after several numbers of
epochs, for each seed:

    tune        DeiT-tiny, tuned without labels on 1,000 images of ImageNet (`--tune`)
    finetune    DeiT-tiny, fine-tuned with the labels of ten classes by the paper's recipe (`--use_kd`)
    small       small models that were trained on handwritten digits, fine-tuned with labels

A row is written to OUTPUT/rows.jsonl as soon as a point is done; the same command goes on from there. The tables are
in OUTPUT/results.md, with the standard error of each figure and of each difference from the paper's rule.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
import tyro
from small_training import Images, load, trained
from torch import Tensor, nn

import vbp
from vbp.data import digits
from vbp.training.losses import DistillationLoss

Part = Literal["tune", "finetune", "small"]

# Starting point -> how it is pruned; the first is what the others are compared with.
STARTS: Final[dict[str, dict[str, Any]]] = {
    "paper": {"criterion": "variance", "compensation": "mean", "batchnorm": "keep", "global_pruning": True},
    "paper, refit": {"criterion": "variance", "compensation": "refit", "global_pruning": True},
    "auto, refits": {"criterion": "auto", "compensation": "refit"},
    "random": {"criterion": "random", "compensation": "mean", "batchnorm": "keep"},
}
MODEL: Final = "deit_tiny_patch16_224"
_BATCH: Final = 64
_SMALL_RATE: Final = 5e-4


@dataclass(frozen=True)
class Options:
    """Compare starting points after training."""

    output: Path
    """Folder for rows, results and runs."""
    imagenet: Path | None = None
    """Images of ImageNet, for the part tune: train/<class>/ and val/<class>/."""
    imagenette: Path | None = None
    """Images of ten of its classes, for the part finetune."""
    checkpoint: Path | None = None
    """Weights of DeiT-tiny in the place of a download."""
    parts: tuple[Part, ...] = ("tune", "finetune", "small")
    """Which parts."""
    starts: tuple[str, ...] = tuple(STARTS)
    """Which starting points; the first is what the others are compared with."""
    ratios: tuple[float, ...] = (0.65, 0.5, 0.3)
    """Keep ratios."""
    epochs: tuple[int, ...] = (0, 2, 8, 32)
    """Numbers of epochs, each with its own schedule."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of subsets, order, augmentation and random channels."""
    models: tuple[str, ...] = ("vit", "vit_deep", "vit_massive", "convnext", "swin")
    """Which small models."""
    calib_samples: int = 1000
    """Calibration images of DeiT-tiny."""
    limit_val: int = 0
    """Validation images of DeiT-tiny; 0 takes all."""
    num_workers: int = 2
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    amp: str = "auto"
    """Precision of training: auto, off, bf16 or fp16."""


@dataclass(frozen=True)
class Point:
    """One figure that is measured."""

    part: str
    model: str
    start: str
    ratio: float
    epochs: int
    seed: int

    @property
    def folder(self) -> str:
        """Return the name of its run."""
        start = self.start.replace(", ", "_")
        return f"{self.part}_{start}_{self.ratio:g}_epochs{self.epochs}_seed{self.seed}"


@dataclass(frozen=True)
class Row(Point):
    """What came of a point: top-1 in percent on so many validation images, and that of the dense model."""

    top1: float
    dense: float
    images: int
    seconds: float

    @property
    def point(self) -> Point:
        """Return what was measured."""
        return Point(*(getattr(self, field.name) for field in dataclasses.fields(Point)))


def points(options: Options) -> Iterator[Point]:
    """Return all points, in the order in which they are measured: one seed after the other."""
    for seed in options.seeds:
        for part in options.parts:
            for model in options.models if part == "small" else (MODEL,):
                for ratio in options.ratios:
                    for start in options.starts:
                        for epochs in options.epochs:
                            yield Point(part, model, start, ratio, epochs, seed)


def run_config(options: Options, point: Point) -> vbp.RunConfig:
    """Return the run that measures a point of DeiT-tiny."""
    tuned = point.part == "tune"
    data = options.imagenet if tuned else options.imagenette
    if data is None:
        raise vbp.InputError(f"part {point.part} needs images, got no --{'imagenet' if tuned else 'imagenette'}")
    epochs: dict[str, Any] = {"tune": point.epochs or "off", "epochs_ft": 0}
    if not tuned:
        epochs = {"epochs_ft": point.epochs, "use_kd": point.epochs > 0}
    return vbp.RunConfig(
        data_path=str(data),
        model_name=MODEL,
        checkpoint=options.checkpoint,
        keep_ratio=point.ratio,
        calib_samples=options.calib_samples,
        limit_val=options.limit_val,
        num_workers=options.num_workers,
        device=options.device,
        amp=options.amp,  # type: ignore[arg-type]
        seed=point.seed,
        save_dir=options.output / "runs" / point.folder,
        resume="auto",
        **STARTS[point.start],
        **epochs,
    )


def measured_run(options: Options, point: Point) -> Row:
    """Run a point of DeiT-tiny, or go on with its run."""
    report = vbp.run(run_config(options, point))
    stage = "tune" if point.part == "tune" else "finetune"
    # The last epoch of fine-tuning, not the best: that would be chosen on the images that judge.
    return _row(point, report.final.score, report.base.score, report.images["val"], report.seconds.get(stage, 0.0))


def _row(point: Point, top1: float, dense: float, images: int, seconds: float) -> Row:
    return Row(**vars(point), top1=top1, dense=dense, images=images, seconds=seconds)


class Shuffled:
    """Batches of images in memory, in a new order in each epoch."""

    def __init__(self, images: Images, seed: int) -> None:
        """Begin with the first epoch."""
        self._images, self._seed, self._epoch, self._start = images, seed, 0, 0

    def __len__(self) -> int:
        return math.ceil(len(self._images.labels) / _BATCH)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of an epoch."""
        self._epoch, self._start = epoch, start

    def global_size(self, batch: int) -> int:
        """Return the images of a batch."""
        return min(_BATCH, len(self._images.labels) - batch * _BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self._seed + self._epoch)
        order = torch.randperm(len(self._images.labels), generator=generator)
        for places in list(torch.split(order, _BATCH))[self._start :]:
            yield self._images.pixels[places], self._images.labels[places]


class Small:
    """The small models and their images, made when they are first needed."""

    def __init__(self, options: Options) -> None:
        """Write the digits."""
        folder = options.output / "digits"
        digits.write_digits(folder)
        self._options = options
        self.train, self.val = (load(folder, split, 0) for split in ("train", "val"))
        self._dense: dict[str, nn.Module] = {}
        self._starts: dict[tuple[Any, ...], nn.Module] = {}

    def measure(self, point: Point) -> Row:
        """Prune a small model, fine-tune it with labels and distillation, and measure it."""
        if point.model not in self._dense:
            self._dense = {point.model: trained(point.model, self.train, self._options.output / "weights", 0)}
        dense = self._dense[point.model]
        model, seconds = copy.deepcopy(self._start(point, dense)), 0.0
        if point.epochs:
            seconds = self._fine_tune(model, dense, point)
        val = [(self.val.pixels, self.val.labels)]
        found, base = (vbp.evaluate(each, val, "cpu") for each in (model, dense))
        return _row(point, found.top1, base.top1, found.images, seconds)

    def _start(self, point: Point, dense: nn.Module) -> nn.Module:
        key = (point.model, point.start, point.ratio, point.seed)
        if key not in self._starts:
            batches = torch.split(self.train.pixels, _BATCH)
            settings: dict[str, Any] = {
                "keep_ratio": point.ratio,
                "calib_samples": 0,
                "seed": point.seed,
                "progress": False,
            }
            self._starts = {key: vbp.prune(dense, batches, **settings, **STARTS[point.start]).model}
        return self._starts[key]

    def _fine_tune(self, model: nn.Module, dense: nn.Module, point: Point) -> float:
        torch.manual_seed(point.seed)
        loader = Shuffled(self.train, point.seed)
        settings = vbp.TrainerSettings(
            steps=point.epochs * len(loader), learning_rate=_SMALL_RATE, loss=DistillationLoss()
        )
        teacher = copy.deepcopy(dense)
        trainer = vbp.Trainer(model, settings, device=torch.device("cpu"), teacher=teacher)
        return sum(trainer.train_epoch(loader, epoch).seconds for epoch in range(1, point.epochs + 1))


def spread(values: list[float], images: int, typical: float) -> float:
    """Return the standard error of a mean over seeds, in points; of a single one that of its images.

    Args:
        values: In percent, one for each seed.
        images: On which each was measured.
        typical: Top-1 in percent, from which the error of a single value follows.
    """
    if len(values) > 1:
        return statistics.stdev(values) / math.sqrt(len(values))
    share = typical / 100
    return 100 * math.sqrt(max(share * (1 - share), 0.0) / images)


def results(rows: list[Row], starts: tuple[str, ...]) -> str:
    """Return the tables in Markdown: top-1 of each point, and how far it is from that of the first starting point."""
    cells: dict[tuple[str, str, float, int, str], dict[int, Row]] = {}
    for row in rows:
        cells.setdefault((row.part, row.model, row.ratio, row.epochs, row.start), {})[row.seed] = row
    lines = []
    for part, model in dict.fromkeys((row.part, row.model) for row in rows):
        of_part = [row for row in rows if (row.part, row.model) == (part, model)]
        ratios, epochs = (sorted({getattr(row, name) for row in of_part}) for name in ("ratio", "epochs"))
        seeds, dense = sorted({row.seed for row in of_part}), of_part[0].dense
        lines += [f"## {part}: {model}", "", f"{len(seeds)} seeds, dense top-1 {dense:.2f} %.", ""]
        lines += [f"| keep ratio | start | {' | '.join(f'{count} epochs' for count in epochs)} |"]
        lines += ["|---|---|" + "---|" * len(epochs)]
        for ratio in reversed(ratios):
            for start in starts:
                keys = [(part, model, ratio, count) for count in epochs]
                shown = [_cell(cells.get((*key, start)), cells.get((*key, starts[0]))) for key in keys]
                if any(text != "-" for text in shown):
                    lines.append(f"| {ratio:g} | {start} | {' | '.join(shown)} |")
        lines += ["", *_conclusions(cells, part, model, max(epochs), starts), ""]
    return "\n".join(lines)


def _cell(ours: dict[int, Row] | None, first: dict[int, Row] | None) -> str:
    """Return top-1 with its standard error and, after another starting point, the difference from the first."""
    if ours is None:
        return "-"
    values, images = [row.top1 for row in ours.values()], next(iter(ours.values())).images
    mean = statistics.mean(values)
    text = f"{mean:.2f} ± {spread(values, images, mean):.2f}"
    if first is None or first is ours:
        return text
    difference, error = _difference(ours, first)
    return f"{text} ({difference:+.2f} ± {error:.2f})"


def _difference(ours: dict[int, Row], first: dict[int, Row]) -> tuple[float, float]:
    """Return by how many points ours is above, over the seeds that both have, and the standard error of that."""
    seeds = sorted(ours.keys() & first.keys())
    if not seeds:
        return math.nan, math.nan
    values = [ours[seed].top1 - first[seed].top1 for seed in seeds]
    one = ours[seeds[0]]
    # Of one seed both errors count; the images are the same, so this is more than the true one.
    single = math.hypot(spread([0.0], one.images, one.top1), spread([0.0], one.images, first[seeds[0]].top1))
    error = spread(values, one.images, one.top1) if len(values) > 1 else single
    return statistics.mean(values), error


def _conclusions(
    cells: dict[tuple[str, str, float, int, str], dict[int, Row]],
    part: str,
    model: str,
    epochs: int,
    starts: tuple[str, ...],
) -> list[str]:
    """Return for each other starting point where it is still ahead of the first after the most epochs."""
    lines = []
    for start in starts[1:]:
        verdicts = []
        for key, ours in cells.items():
            if key[:2] != (part, model) or key[3:] != (epochs, start):
                continue
            first = cells.get((*key[:4], starts[0]))
            if first is None:
                continue
            difference, error = _difference(ours, first)
            verdict = "no difference beyond two standard errors"
            if abs(difference) > 2 * error:
                verdict = "above" if difference > 0 else "below"
            verdicts.append(f"keep {key[2]:g}: {verdict} ({difference:+.2f} ± {error:.2f})")
        if verdicts:
            lines.append(f"- After {epochs} epochs `{start}` against `{starts[0]}`: {'; '.join(verdicts)}.")
    return lines


def read_rows(file: Path) -> list[Row]:
    """Read the rows that are there; half a line that a kill left is no row."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(Row(**json.loads(line)))
        except ValueError:
            continue
    return rows


def main(options: Options) -> None:
    """Measure what is missing, and write the tables after each point."""
    for start in options.starts:
        if start not in STARTS:
            raise vbp.InputError(f"starts must be among {'; '.join(STARTS)}, got {start}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "rows.jsonl"
    rows = read_rows(file)
    file.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    done = {row.point for row in rows}
    wanted = list(points(options))
    small: Small | None = None
    for number, point in enumerate(wanted, start=1):
        if point in done:
            continue
        if point.part == "small":
            small = small or Small(options)
            row = small.measure(point)
        else:
            row = measured_run(options, point)
        rows.append(row)
        with file.open("a") as stream:
            stream.write(json.dumps(dataclasses.asdict(row)) + "\n")
        print(f"{number}/{len(wanted)} {point.folder} {point.model}: top-1 {row.top1:.2f} %", flush=True)
        _write(options, rows)
    _write(options, rows)
    print(f"results: {options.output / 'results.md'}")


def _write(options: Options, rows: list[Row]) -> None:
    """Write the tables, with what they were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    conditions = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, vbp {vbp.__version__}"
    asked = set(points(options))
    shown = [row for row in rows if row.point in asked]
    explained = (
        "Top-1 in percent ± standard error over the seeds (of one seed: over the images); in brackets the difference "
        f"from `{options.starts[0]}` with its standard error, paired by seed."
    )
    text = f"# Starting points after training\n\n{explained}\n\n{conditions}\n\n{results(shown, options.starts)}"
    (options.output / "results.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
