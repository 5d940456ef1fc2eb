"""The configuration of a sweep: what it varies, and the flags of a run that it shares; nothing here needs torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vbp.recipes.config import RunConfig
from vbp.recipes.options import (
    DataOptions,
    Launch,
    ModelOptions,
    ProcessOptions,
    RefitOptions,
    Result,
    Source,
    WidthOptions,
)
from vbp.runtime.choices import Amp

if TYPE_CHECKING:
    from vbp.sweeps.report import Setting


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
    latency: Result[bool] = False
    """Also time each pruned model, in turns with the dense one."""


@dataclass(frozen=True)
class SweepConfig(ProcessOptions, WidthOptions, RefitOptions, VariedOptions, DataOptions, ModelOptions):
    """Prune one dense model in many ways, each from the dense weights, and compare; nothing is fine-tuned.

    Example: vbp sweep --data_path DATA --model_name deit_tiny_patch16_224 --criteria variance/mean auto
    """

    # What differs from a run: nothing stops the calibration early, gradients are collected without autocast.
    calib_samples: Source[int] = 0
    """Training images for statistics and gradients, chosen class-balanced by the seed; 0 takes all."""
    amp: Source[Amp] = "auto"
    """Autocast of statistics and evaluation: bf16, fp16, off, or auto (bf16 where the GPU has it); not of
    gradients."""
    save_dir: Launch[Path] = Path("./output/sweep")
    """Where table, figure, statistics and log go; a sweep that was stopped there goes on."""
    seed: Result[int] = 0
    """Seed of subsets, of sampled tokens, of sensitivities and of the random criterion."""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Return all that is asked for."""
        from vbp.sweeps.checks import settings_of

        return settings_of(self.criteria, self.compensations, self.keep_ratios, self.scopes)

    def run_config(self) -> RunConfig:
        """Return the configuration by which model and data are loaded, as for a run that only prunes."""
        names = {field.name for field in dataclasses.fields(RunConfig)}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        # The sweep itself checks what is needed of the images, and whether the folder may be written: its own results
        # may be there.
        fixed = {"criterion": "variance", "compensation": "refit", "epochs_ft": 0, "overwrite": True}
        return RunConfig(**shared | fixed | {"keep_ratio": min(self.keep_ratios)})
