"""Draw the figure of the README, accuracy against MACs, from the table in docs/refit.md.

    python benchmarks/readme_figure.py

The MACs of each keep ratio are counted on the model itself: at a given ratio every plan of a DeiT has the same,
whichever layers the channels come from. Writes docs/retention.svg.
"""

from __future__ import annotations

import re
from pathlib import Path

from vbp import load_classifier
from vbp.cost.widths import WidthCosts
from vbp.pruning.make_plan import PlanRules
from vbp.report.style import BLUE, ORANGE, canvas, render
from vbp.sites.find import find_sites

ROOT = Path(__file__).parents[1]
MODEL = "deit_tiny_patch16_224"


def read_table() -> tuple[list[float], dict[str, list[float]]]:
    """Return the keep ratios, and the retention of each method at them."""
    text = (ROOT / "docs/refit.md").read_text()
    text = text[text.index("## What to expect") :]
    header, _, *rows = re.findall(r"^\|(.*)\|$", text, re.M)[:4]
    cells = {name.strip(): [float(value) for value in values] for name, *values in (row.split("|") for row in rows)}
    return [float(value) for value in re.findall(r"[\d.]+", header)], cells


def macs_left(ratios: list[float]) -> list[float]:
    """Return the share of the dense model's MACs, in percent, at each keep ratio."""
    classifier = load_classifier(MODEL, allow_random_init=True)
    example = classifier.example_input()
    sites = find_sites(classifier.model, example)
    costs = WidthCosts.of(classifier.model, sites, example)
    return [100 * costs.macs_of(PlanRules().neutral(sites, ratio)) / costs.macs for ratio in ratios]


def main() -> None:
    """Draw the figure."""
    ratios, methods = read_table()
    macs = macs_left(ratios)
    with canvas(3.4, 1, 6.4) as (figure, axes):
        for (method, shares), colour in zip(methods.items(), (ORANGE, BLUE), strict=True):
            axes.plot(
                macs, [100 * share for share in shares], marker="o", color=colour, label=method.replace("`", "")
            )
        axes.set_xlabel("MACs left (%)")
        axes.set_ylabel("top-1 left (% of dense)")
        axes.set_ylim(0, 105)
        axes.legend(loc="lower right")
        figure.suptitle("DeiT-tiny, ImageNet classes, right after pruning, no training", fontsize=10)
        (ROOT / "docs/retention.svg").write_bytes(render(figure, "retention")[0])


if __name__ == "__main__":
    main()
