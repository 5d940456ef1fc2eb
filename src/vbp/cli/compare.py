"""The job of `vbp compare`: runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vbp.report.comparison import RunComparison, compare


@dataclass(frozen=True)
class CompareConfig:
    """Show runs side by side: what differs in their settings, and what came of it.

    Example: vbp compare output/keep_65 output/keep_50
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of two or more runs, or of the pruned models in them."""
    json: Annotated[bool, tyro.conf.arg(help="Print JSON in the place of a table.")] = False


def run_compare(config: CompareConfig) -> RunComparison:
    """Do what the configuration says.

    Raises:
        InputError: There are fewer than two runs, or a folder holds none.
    """
    return compare(config.runs)
