"""The job of `vbp compare`: runs side by side."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vbp.cli.options import CompareConfig
from vbp.recipes.config import RunConfig
from vbp.recipes.options import Role, fields_with

if TYPE_CHECKING:
    from vbp.report.comparison import RunComparison


def run_compare(config: CompareConfig) -> RunComparison:
    """Return runs side by side; fewer than two are a usage error, exit code 2."""
    if len(config.runs) < 2:
        sys.stderr.write(f"vbp compare: needs at least two runs, got {len(config.runs)}; vbp compare RUN RUN ...\n")
        raise SystemExit(2)
    # It needs torch, a usage error does not.
    from vbp.report.comparison import compare

    return compare(config.runs, incidental=fields_with(RunConfig, Role.LAUNCH), form=config.form)
