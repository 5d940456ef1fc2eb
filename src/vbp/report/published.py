"""Published results of the VBP paper: where accuracy and multiply-accumulates are both known."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Final

_PAPER: Final = json.loads((files("vbp.report") / "assets" / "published.json").read_text(encoding="utf-8"))
SOURCE: Final[str] = _PAPER["source"]


@dataclass(frozen=True)
class PublishedPoint:
    """MACs and top-1 of one published model right after pruning and after fine-tuning, in percent of the dense one's.

    `removed` is the share of the MLP channels that went, in percent; `pruned` is None where it is not published.
    """

    model: str
    removed: int
    macs: float
    pruned: float | None
    tuned: float
    source: str = SOURCE


def _points(entry: dict[str, Any]) -> tuple[PublishedPoint, ...]:
    name, top1, dense_macs = entry["model"], entry["dense"]["top1"], entry["dense"]["macs"]
    return tuple(
        PublishedPoint(
            name,
            removed,
            100 * macs / dense_macs,
            None if pruned is None else 100 * pruned / top1,
            100 * tuned / top1,
        )
        for removed, pruned, tuned, macs in entry["points"]
    )


PAPER_POINTS: Final = tuple(point for entry in _PAPER["models"] for point in _points(entry))


def points_of(model_name: str) -> tuple[PublishedPoint, ...]:
    """Return the paper's points of a model with this timm or Hugging Face name, named `paper, MODEL, pruned`."""
    name = model_name.rpartition("/")[2].replace("-", "_")
    if "distilled" in name:
        return ()
    wanted = {entry["model"] for entry in _PAPER["models"] if name.startswith(entry["names"])}
    return tuple(
        replace(point, model=f"paper, {point.model}, pruned") for point in PAPER_POINTS if point.model in wanted
    )
