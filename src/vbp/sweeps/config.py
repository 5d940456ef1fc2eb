"""The configuration of a sweep: what it varies, and the flags of a run that it shares; nothing here needs torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vbp.recipes.config import RunConfig, TuningOptions
from vbp.recipes.options import (
    DataOptions,
    Launch,
    ModelOptions,
    ProcessOptions,
    RefitOptions,
    Result,
    Role,
    Source,
    WidthOptions,
)
from vbp.runtime.choices import Amp

if TYPE_CHECKING:
    from vbp.sweeps.rows import Point, Setting


@dataclass(frozen=True)
class VariedOptions:
    """What a sweep varies."""

    keep_ratios: Source[tuple[float, ...]] = (0.95, 0.9, 0.8, 0.65, 0.5, 0.4)
    """Shares of the hidden MLP channels to keep, in (0, 1]."""
    criteria: Source[tuple[str, ...]] = ("variance/mean", "auto")
    """auto (always with refit, and with widths of its own whatever the scopes), variance, output_variance,
    elimination, random, l1, l2, lamp, taylor, snip; l2/none for one compensation alone."""
    compensations: Source[tuple[str, ...]] = ("mean", "refit")
    """What stands in for removed channels: none, mean, refit; for each criterion that names none, but auto."""
    scopes: Source[tuple[str, ...]] = ("global",)
    """global (the channels of all layers compete), per_layer (each keeps the same share), equal (layers of one width
    keep equally many), or several of them."""
    seeds: Source[int] = 1
    """Do all of it for so many seeds, from --seed on: of the calibration images, and of fine-tuning. Statistics from
    --stats_path serve all of them."""
    latency: Result[bool] = False
    """Also time each pruned model, in turns with the dense one."""


@dataclass(frozen=True)
class SweepConfig(
    ProcessOptions, TuningOptions, WidthOptions, RefitOptions, VariedOptions, DataOptions, ModelOptions
):
    """Prune one dense model in many ways, each from the dense weights, and compare; with --epochs_ft fine-tuned too.

    vbp sweep FOLDER merges what the points of a sweep have left in its folder, and says which are missing.

    Example: vbp sweep --data_path DATA --model_name deit_tiny_patch16_224 --criteria variance/mean auto
    """

    # What differs from a run: nothing stops the calibration early, gradients are collected without autocast.
    calib_samples: Source[int] = 0
    """Training images for statistics and gradients, chosen class-balanced by the seed; 0 takes all."""
    amp: Source[Amp] = "auto"
    """Autocast of statistics, evaluation and fine-tuning: bf16, fp16, off, or auto (bf16 where the GPU has it); not
    of gradients."""
    epochs_ft: Result[int] = 0
    """Epochs of fine-tuning of each model; 0 only prunes."""
    checkpoint_minutes: Annotated[float, Role.SPEED, Role.TUNING] = 30.0
    """Besides one at the end of each epoch, write a checkpoint every so many minutes; 0 does not."""
    save_dir: Launch[Path] = Path("./output/sweep")
    """Where table, figures, page, statistics and logs go; a sweep that was stopped there goes on."""
    point: Launch[str | None] = None
    """K/N: of the points, which are settings times seeds, do only the K-th of N shares, beside other jobs on the same
    folder; 0/N measures the dense model and collects the statistics that they share. vbp sweep FOLDER merges."""
    seed: Result[int] = 0
    """Seed of subsets, of sampled tokens, of sensitivities, of the random criterion, and of fine-tuning."""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Return all ways to prune that are asked for."""
        from vbp.sweeps.checks import settings_of

        return settings_of(self.criteria, self.compensations, self.keep_ratios, self.scopes)

    @property
    def points(self) -> tuple[Point, ...]:
        """Return all models that are asked for: the settings with the first seed, then those with the next one."""
        from vbp.sweeps.rows import Point

        seeds = range(self.seed, self.seed + self.seeds)
        return tuple(Point(setting, seed) for seed in seeds for setting in self.settings)

    def run_config(self) -> RunConfig:
        """Return the configuration by which model and data are loaded, as for a run."""
        names = {field.name for field in dataclasses.fields(RunConfig)}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        # The sweep itself checks what is needed of the images, and whether the folder may be written: its own results
        # may be there.
        fixed = {"criterion": "variance", "compensation": "refit", "overwrite": True}
        return RunConfig(**shared | fixed | {"keep_ratio": min(self.keep_ratios)})

    def run_config_of(self, point: Point, folder: Path) -> RunConfig:
        """Return the configuration of a run that prunes and fine-tunes one point into a folder."""
        setting = point.setting
        return dataclasses.replace(
            self.run_config(),
            criterion=setting.criterion,  # type: ignore[arg-type]
            compensation=setting.compensation,
            global_pruning=setting.scope == "global" and setting.criterion != "auto",
            equal_widths=setting.scope == "equal",
            keep_ratio=setting.keep_ratio,
            seed=point.seed,
            save_dir=folder,
            overwrite=False,
        )


@dataclass(frozen=True)
class MergeConfig:
    """Merge what the points of a sweep have left in its folder: table, figures and page; and say what is missing.

    Example: vbp sweep output/sweep
    """

    folder: tyro.conf.Positional[Path]
    """The save_dir of a sweep."""
    json: bool = False
    """Print JSON in the place of a table."""
