"""Small models of each family, shared by the tests: random weights, CPU, a few milliseconds each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family
from hub_stand_in import Hub, served
from threads import single_thread
from torch import nn

from vbp import RunConfig
from vbp.data.digits import write_digits
from vbp.recipes.config import DemoConfig
from vbp.recipes.demo import demo_run_config


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Return each family in turn."""
    return FAMILIES[request.param]


@pytest.fixture
def vit() -> nn.Module:
    """Return a small ViT in float64."""
    torch.manual_seed(0)
    return FAMILIES["timm-vit"].build().double().eval()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub that knows nothing yet, on which `me` may write."""
    with served(tmp_path / "cache", monkeypatch) as known:
        yield known


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread, as the processes of the tests do: a sum over threads has other last bits."""
    with single_thread():
        yield


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the digits in it."""
    folder = tmp_path_factory.mktemp("demo")
    write_digits(folder / "data")
    return folder


@pytest.fixture(scope="session")
def digits(demo_folder: Path) -> Path:
    """Return the folder with the demo's images, to be read only."""
    return demo_folder / "data"


@pytest.fixture(scope="session")
def demo_config(demo_folder: Path) -> RunConfig:
    """Return the demo's configuration, cut to one epoch."""
    return demo_run_config(DemoConfig(folder=demo_folder, epochs_ft=1))


@pytest.fixture
def quick(demo_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a run of a few images, without fine-tuning and without drawing, into its own folder.

    Models are timed in short turns and one image at a time: how exact times are is no part of its tests.
    """
    monkeypatch.setattr("vbp.report.html.write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr("vbp.cost.timing.TURN_S", 0.005)
    monkeypatch.setattr("vbp.cost.timing.CPU_BATCH_MACS", 1)
    return dataclasses.replace(
        demo_config,
        epochs_ft=0,
        calib_samples=40,
        limit_val=40,
        use_kd=False,
        lr_ft=RunConfig.lr_ft,
        compare_uncompensated=False,
        save_dir=tmp_path / "run",
        overwrite=False,
    )
