"""Runs that cut attention in its principal basis: taken up again, pruned again, and of attentions that are split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from launching import weights

from vbp import PruningPlan, RunConfig, load_pruned, read_artifact, run
from vbp.cli.inspect import run_inspect
from vbp.cli.options import InspectConfig

ATTENTION = {
    **{"criterion": "auto", "compensation": "refit", "keep_ratio": 1.0, "bottleneck": True, "attn_keep_ratio": 0.5},
    **{"refit_head": "off", "refit_stream": "off"},
}
NAME = "beit_base_patch16_224"
BEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture
def beit(quick: RunConfig, tmp_path: Path) -> RunConfig:
    """Return a run of a model whose attentions are split, with its weights in a file."""
    torch.manual_seed(0)
    file = tmp_path / "beit.pth"
    torch.save(timm.create_model(NAME, **BEIT).state_dict(), file)
    return dataclasses.replace(
        quick,
        **ATTENTION,
        model_name=NAME,
        model_type="auto",
        checkpoint=file,
        model_kwargs=BEIT,
        allow_bad_dense=True,
    )


def test_a_run_that_is_taken_up_again_ends_as_before(beit: RunConfig, one_thread: None) -> None:
    config = dataclasses.replace(beit, epochs_ft=1)
    found = run(config)
    assert found.attention == 0.5
    assert len(PruningPlan.load(config.save_dir / "plan.json").principal) == 4
    before = weights(config.save_dir / "vbp_final.pth")
    newest = sorted((config.save_dir / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    for name in ("summary.json", "vbp_final.pth"):
        (config.save_dir / name).unlink()
    again = run(dataclasses.replace(config, resume="auto"))
    assert again.final == found.final
    after = weights(config.save_dir / "vbp_final.pth")
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in after)


def test_a_pruned_model_is_pruned_again(beit: RunConfig) -> None:
    run(beit)
    artifact = beit.save_dir / "artifact"
    second = dataclasses.replace(
        beit, save_dir=beit.save_dir.parent / "second", model_name=str(artifact), checkpoint=None, model_kwargs={}
    )
    found = run(second)
    assert len(read_artifact(second.save_dir / "artifact").plans) == 2
    loaded, before = (load_pruned(one.save_dir / "artifact") for one in (second, beit))
    for name, parameter in before.named_parameters():
        if name.endswith("attn.proj.weight"):
            assert loaded.get_parameter(name).shape == (parameter.shape[0], parameter.shape[1] // 2)
    assert loaded(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert found.final.macs < found.base.macs
    kinds = [site.kind for site in run_inspect(InspectConfig(model=str(artifact), attention=True)).sites]
    assert kinds.count("value") == kinds.count("query_key") > 0
