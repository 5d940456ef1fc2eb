"""Jobs that are killed before some of their file operations go on and end like one that nobody killed.

The harness is that of `benchmarks/faults.py kills`, which kills before all of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from launching import finish

FAULTS = Path(__file__).parents[2] / "benchmarks/faults.py"


def test_a_job_that_is_killed_at_a_file_operation_goes_on_and_leaves_nothing_else() -> None:
    words = ("kills", "--jobs", "prune", "overwrite_sweep", "--every", "30", "--images", "3")
    result = finish([sys.executable, str(FAULTS), *words], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    for job in ("prune", "overwrite_sweep"):
        row = re.search(rf"\| {job} \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", result.stdout)
        assert row is not None, result.stdout
        operations, killed, right, refused, other = map(int, row.groups())
        assert operations > 60
        assert killed == right + refused == (operations + 29) // 30
        assert other == 0, result.stdout
        # The results of another sweep that were not touched yet are kept.
        assert refused == 0 if job == "prune" else refused >= 1, result.stdout
        assert right >= 1
