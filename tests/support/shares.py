"""Statistics of several processes against those of one, run by torchrun; an assertion that fails ends the job."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from vbp import Statistics, collect_statistics, find_sites, make_plan, variance_scores
from vbp.errors import InputError
from vbp.pruning.convergence import merge_across
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.processes import Processes, process_group


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare in relation to the largest value."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, float(error)


def check(processes: Processes, dtype: torch.dtype, tolerance: float) -> None:
    """Share out batches and compare with one pass over all of them."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = model.to(dtype).eval()
    # Large means beside small deviations, uneven batches, and one process without any.
    batches = [torch.randn(size, 3, 32, 32, dtype=dtype) + 3 for size in (4, 4, 3)]
    sites = find_sites(model, batches[0][:1])
    mine = batches[processes.rank :: processes.world]
    own: Statistics | None = collect_statistics(model, sites, mine) if mine else None
    merged, whole = merge_across(own, processes), collect_statistics(model, sites, batches)
    assert merged.images == whole.images == 11
    for name, moments in whole.moments.items():
        assert merged.moments[name].count == moments.count
        close(merged.moments[name].mean, moments.mean, tolerance)
        close(merged.moments[name].variance, moments.variance, tolerance)
    plan = make_plan(sites, variance_scores(merged), keep_ratio=0.5, scope="global")
    processes.check_same("plan", json_fingerprint(plan.to_dict()))


if __name__ == "__main__":
    with process_group("cpu", 1.0) as (processes, _):
        assert processes.world == 4
        check(processes, torch.float64, 1e-12)
        check(processes, torch.float32, 1e-5)
        with pytest.raises(InputError, match="must hold the same plan, got 0: plan of 0, 1: plan of 1"):
            processes.check_same("plan", f"plan of {processes.rank % 2}")
