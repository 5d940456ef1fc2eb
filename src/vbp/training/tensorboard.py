"""Curves of a run for TensorBoard (extra `tracking`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vbp.errors import InputError
from vbp.training.meters import EpochResult


def check_tracking(log_dir: Path | None) -> None:
    """Find out before any work whether curves can be written."""
    if log_dir is None:
        return
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            f"log_dir needs TensorBoard, got {log_dir} without it; pip install 'vbp-pruning[tracking]', or leave "
            "--log_dir out"
        )
    if log_dir.exists() and not log_dir.is_dir():
        raise InputError(f"log_dir must be a folder, got the file {log_dir}; choose another --log_dir")
    nearest = next(path for path in (log_dir, *log_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"log_dir must be a folder that can be written, got {log_dir}; choose another --log_dir")


class Tracker(AbstractContextManager["Tracker"]):
    """Write curves to a folder; without one do nothing."""

    def __init__(self, log_dir: Path | None, first_epoch: int = 0) -> None:
        self._writer: Any = None
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            # What a run that was stopped wrote after its last checkpoint would be drawn twice.
            self._writer = SummaryWriter(str(log_dir), purge_step=first_epoch)

    def __exit__(self, *_: object) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()

    def sites(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Draw the kept channels of each site: its name -> kept and all channels."""
        if self._writer is not None:
            for name, (kept, total) in widths.items():
                self._writer.add_scalar(f"kept_channels/{name}", kept, 0)
                self._writer.add_scalar(f"kept_share/{name}", kept / total, 0)

    def epoch(self, row: Mapping[str, Any], result: EpochResult) -> None:
        """Draw one epoch: a row of metrics.jsonl, and what it does not hold."""
        if self._writer is None:
            return
        curves = {
            "train/loss": row["train_loss"],
            "train/learning_rate": row["lr"],
            "train/images_per_second": result.images_per_second,
            **{f"val/{name}": row[name] for name in ("top1", "top5", "cosine", "neighbours") if name in row},
            **({"train/top1": row["train_top1"]} if "train_top1" in row else {}),
        }
        if result.gradient_norm is not None:
            curves["train/gradient_norm"] = result.gradient_norm
        for name, value in curves.items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()
