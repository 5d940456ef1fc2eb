"""Convolutional networks through a whole run."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from vbp import InputError, RunConfig, load_pruned
from vbp.recipes.run import run
from vbp.sweeps.config import SweepConfig


@pytest.fixture
def small(quick: RunConfig) -> RunConfig:
    """Return a run of a small ResNet of random weights, without fine-tuning."""
    return dataclasses.replace(
        quick,
        model_name="test_resnet",
        model_kwargs={"num_classes": 10},
        model_type="auto",
        checkpoint=None,
        allow_random_init=True,
        allow_bad_dense=True,
        criterion="auto",
        compensation="refit",
        global_pruning=False,
        convolutions=True,
        refit_stream="off",
        refit_head="off",
        calib_samples=16,
        limit_val=16,
    )


def test_larger_kernels_are_pruned_on_request_alone(small: RunConfig) -> None:
    found = run(small)
    assert found.keep_ratio == pytest.approx(0.5, abs=0.01)
    pruned = load_pruned(small.save_dir / "artifact")
    kernels = {
        name: layer.out_channels for name, layer in pruned.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    }  # fmt: skip
    assert found.batchnorm is not None
    assert set(found.batchnorm["divergences"]) == {"keep", "match", "recalibrate"}
    assert found.batchnorm["sentence"] in found.refits
    assert any(kernels.get(name) == kept < total for name, (kept, total) in found.sites.items())
    with pytest.raises(InputError, match=r"no prunable site in ResNet.*--convolutions"):
        run(dataclasses.replace(small, convolutions=False, save_dir=small.save_dir / "without"))


def test_a_sweep_hands_it_on() -> None:
    assert SweepConfig("data", convolutions=True).run_config().convolutions
    assert not SweepConfig("data").run_config().convolutions


def test_a_budget_in_macs_takes_channels_where_they_save_most(small: RunConfig) -> None:
    paper = dataclasses.replace(
        small, criterion="l2", compensation="none", global_pruning=True, keep_ratio=0.65, target_macs="0.7",
        refit_stream="auto", refit_head="auto",
    )  # fmt: skip
    aware = run(dataclasses.replace(paper, cost_aware="on", save_dir=small.save_dir / "on"))
    plain = run(dataclasses.replace(paper, save_dir=small.save_dir / "auto"))
    assert aware.budget["met"]
    assert plain.budget["met"]
    assert aware.keep_ratio > plain.keep_ratio
