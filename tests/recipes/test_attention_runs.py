"""Runs that cut attention in its principal basis: taken up again, pruned again, and of attentions that are split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import weights

from vbp import PruningPlan, RunConfig, load_pruned, read_artifact, run
from vbp.cli.inspect import run_inspect
from vbp.cli.options import InspectConfig

ATTENTION = {
    **{"criterion": "auto", "compensation": "refit", "keep_ratio": 1.0, "bottleneck": True, "attn_keep_ratio": 0.5},
    **{"refit_head": "off", "refit_stream": "off"},
}
BEIT = {
    "model_name": "beit_base_patch16_224",
    "checkpoint": None,
    "allow_random_init": True,
    "model_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10},
}


def changed(config: RunConfig, folder: str, **values: Any) -> RunConfig:
    """Return a configuration with other values and another folder."""
    return dataclasses.replace(config, save_dir=config.save_dir.parent / folder, **{**ATTENTION, **values})


@pytest.mark.parametrize("model", [{}, BEIT], ids=["ViT", "BEiT, split"])
def test_a_run_that_is_taken_up_again_ends_like_one_never_stopped(
    quick: RunConfig, model: dict[str, Any], one_thread: None
) -> None:
    whole, torn = (changed(quick, name, epochs_ft=2, **model) for name in ("whole", "torn"))
    found = run(whole)
    run(torn)
    assert found.attention == 0.5
    assert PruningPlan.load(whole.save_dir / "plan.json").principal
    newest = sorted((torn.save_dir / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    for name in ("summary.json", "vbp_final.pth"):
        (torn.save_dir / name).unlink(missing_ok=True)
    again = run(dataclasses.replace(torn, resume="auto"))
    assert again.final == found.final
    here, there = (weights(one.save_dir / "vbp_final.pth") for one in (whole, torn))
    assert list(here) == list(there)
    assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize("model", [{}, BEIT], ids=["ViT", "BEiT, split"])
def test_a_pruned_model_is_pruned_again(quick: RunConfig, model: dict[str, Any], tmp_path: Path) -> None:
    first = changed(quick, "first", **model)
    run(first)
    artifact = first.save_dir / "artifact"
    own = {"model_name": str(artifact), "checkpoint": None, "allow_random_init": False, "model_kwargs": {}}
    overrides = dict.fromkeys(("img_size", "crop_pct", "interpolation", "mean", "std"))
    second = changed(quick, "second", **own, **{name: None for name in overrides if hasattr(first, name)})
    found = run(second)
    assert len(read_artifact(second.save_dir / "artifact").plans) == 2
    loaded, before = (load_pruned(one.save_dir / "artifact") for one in (second, first))
    for name, parameter in before.named_parameters():
        if name.endswith("attn.proj.weight"):
            assert loaded.get_parameter(name).shape == (parameter.shape[0], parameter.shape[1] // 2)
    assert loaded(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert found.final.macs < found.base.macs
    kinds = [site.kind for site in run_inspect(InspectConfig(model=str(artifact), attention=True)).sites]
    assert kinds.count("value") == kinds.count("query_key") > 0
