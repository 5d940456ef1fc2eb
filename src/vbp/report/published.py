"""Published results of the VBP paper, as data: where accuracy and multiply-accumulates are both known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

SOURCE: Final = (
    "Berisha, Mehnert, Condurache: Variance-Based Pruning for Accelerating and Compressing Trained Networks, "
    "ICCV 2025, arXiv 2507.12988; ImageNet-1k validation"
)


@dataclass(frozen=True)
class PublishedPoint:
    """MACs and top-1 of one published model right after pruning and after fine-tuning, in percent of the dense one's.

    Attributes:
        removed: Share of the MLP channels removed, in percent.
        pruned: None where it is not published.
    """

    model: str
    removed: int
    macs: float
    pruned: float | None
    tuned: float
    source: str = SOURCE


# Share removed in percent, top-1 after pruning, top-1 after ten epochs, MACs in G.
_DEIT_T: Final = (
    (0, 72.02, 72.02, 1.26),
    (5, 71.67, 72.05, 1.22),
    (10, 70.95, 71.92, 1.19),
    (15, 70.05, 71.76, 1.15),
    (20, 68.87, 71.60, 1.12),
    (25, 67.37, 71.44, 1.08),
    (30, 64.76, 71.20, 1.05),
    (35, 61.12, 70.86, 1.01),
    (40, 55.64, 70.55, 0.98),
    (45, 49.77, 70.08, 0.94),
    (50, 39.58, 69.70, 0.91),
)


def _relative(
    model: str, removed: int, pruned: float, tuned: float, macs: float, base: float, base_macs: float
) -> PublishedPoint:
    return PublishedPoint(model, removed, 100 * macs / base_macs, 100 * pruned / base, 100 * tuned / base)


PAPER_POINTS: Final[tuple[PublishedPoint, ...]] = (
    *(_relative("DeiT-T", removed, pruned, tuned, macs, 72.02, 1.26) for removed, pruned, tuned, macs in _DEIT_T),
    # Published as shares of the dense model.
    PublishedPoint("DeiT-S", 50, 100 - 30.4, 80.85, 98.64),
    PublishedPoint("DeiT-B", 20, 100 - 12.7, 100 * 80.87 / 81.73, 100 * 81.76 / 81.73),
    _relative("DeiT-B", 55, 57.58, 80.67, 11.44, 81.73, 17.58),
    PublishedPoint("Swin-T", 45, 100 - 28.2, None, 98.15),
    _relative("ConvNeXt-T", 50, 16.80, 81.30, 2.96, 82.90, 4.47),
)

_PAPER_NAMES: Final = {
    "deit_tiny": "DeiT-T",
    "deit_small": "DeiT-S",
    "deit_base": "DeiT-B",
    "swin_tiny": "Swin-T",
    "convnext_tiny": "ConvNeXt-T",
}


def points_of(model_name: str) -> tuple[PublishedPoint, ...]:
    """Return the paper's points of a model with this timm or Hugging Face name, named `paper, MODEL, pruned`."""
    name = model_name.rpartition("/")[2].replace("-", "_")
    if "distilled" in name:
        return ()
    wanted = {paper for start, paper in _PAPER_NAMES.items() if name.startswith(start)}
    return tuple(
        replace(point, model=f"paper, {point.model}, pruned") for point in PAPER_POINTS if point.model in wanted
    )
