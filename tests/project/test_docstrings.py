"""Every public name of `vbp` has a short example in its docstring, and each example prints what it says."""

from __future__ import annotations

import copy
import doctest
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from hub_stand_in import Hub
from PIL import Image

import vbp
from vbp.cli.parse import parse
from vbp.deploy.settings import LatencySettings
from vbp.method.sampling import RandomProbes
from vbp.recipes.checks import check_config
from vbp.statistics.evidence import Evidence

REFERENCE = Path(__file__).parents[2] / "docs/reference/index.md"
# The names that the top level exports, as the index of the reference lists them.
NAMES = re.findall(r"^\| .*?\[`(\w+)`\]", REFERENCE.read_text(), re.MULTILINE)
SIZE, CLASSES = 32, 7
ARCHITECTURE = "vit_tiny_patch16_224"
SIZES = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
PREPROCESSING = vbp.Preprocessing((SIZE, SIZE), 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


@cache
def dense() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURE, **SIZES).eval()


@cache
def images() -> torch.Tensor:
    return torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@cache
def sites() -> tuple[vbp.Site, ...]:
    return vbp.find_sites(dense(), images()[:1])


@cache
def statistics() -> vbp.Statistics:
    return vbp.collect_statistics(dense(), sites(), [images()], covariance=True, sensitivity=RandomProbes())


@cache
def plan(scope: Literal["global", "equal"] = "global") -> vbp.PruningPlan:
    return vbp.make_plan(sites(), vbp.variance_scores(statistics()), keep_ratio=0.5, scope=scope)


def pruned(scope: Literal["global", "equal"] = "global") -> torch.nn.Module:
    model = copy.deepcopy(dense())
    vbp.prune_(model, plan(scope), statistics().means)
    return model


def saved(folder: Path) -> Path:
    vbp.save_pruned(pruned(), folder / "saved", plans=plan(), metrics={"top1": 75.0})
    return folder / "saved"


def write_images(folder: Path) -> Path:
    """Write two images of each class into both splits."""
    for number in range(2 * CLASSES):
        for split in ("train", "val"):
            (folder / split / f"class{number % CLASSES}").mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (SIZE, SIZE), (17 * number, 120, 255 - 17 * number))
            image.save(folder / split / f"class{number % CLASSES}/{number}.png")
    return folder


def configuration(folder: Path) -> vbp.RunConfig:
    """Return a run of the tiny model on images of a single colour, without fine-tuning."""
    return vbp.RunConfig(
        data_path=str(write_images(folder / "images")),
        save_dir=folder / "run",
        model_name=ARCHITECTURE,
        model_kwargs=SIZES,
        allow_random_init=True,
        keep_ratio=0.5,
        criterion="variance",
        compensation="mean",
        epochs_ft=0,
        num_workers=0,
        latency_batch=1,
        device="cpu",
        disable_ddp=True,
    )


# What an example may name besides `vbp` and `torch`; each is made for the examples that name it.
SHARED: dict[str, Callable[[Path], Any]] = {
    "model": lambda _: copy.deepcopy(dense()),
    "images": lambda _: images(),
    "labels": lambda _: torch.arange(8) % CLASSES,
    "example": lambda _: images()[:1],
    "sites": lambda _: sites(),
    "statistics": lambda _: statistics(),
    "evidence": lambda _: Evidence(statistics()),
    "reference": lambda _: vbp.DenseReference(dense(), [images()]),
    "plan": lambda _: plan(),
    "pruned": lambda _: pruned(),
    "equal_plan": lambda _: plan("equal"),
    "equal_pruned": lambda _: pruned("equal"),
    "source": lambda _: vbp.ModelSource("timm", ARCHITECTURE, SIZES),
    "preprocessing": lambda _: PREPROCESSING,
    "transform": lambda _: vbp.evaluation_transform(PREPROCESSING),
    "picture": lambda _: Image.new("RGB", (48, 48)),
    "data": lambda folder: write_images(folder / "images"),
    "train": lambda folder: vbp.list_images(write_images(folder / "images"), "train", CLASSES),
    "config": configuration,
    "settings": lambda _: LatencySettings(rounds=3, warmup=1),
    "saved": saved,
    "exported": lambda folder: vbp.export_model(pruned(), images(), folder / "pruned.pt2", to="pt2").file,
    "folder": lambda folder: folder,
}


def docstring_of(name: str) -> str:
    return getattr(vbp, name).__doc__ or ""


def test_the_reference_lists_every_public_name_once() -> None:
    assert sorted(NAMES) == sorted(vbp.__all__)


def test_the_example_of_a_run_is_its_command() -> None:
    # The docstring is the help of `vbp run`, in which a user looks for a command.
    command = re.search(r"^    Example: vbp run (.*)", docstring_of("RunConfig"), re.MULTILINE)
    assert command is not None
    check_config(parse(vbp.RunConfig, shlex.split(command[1]), "vbp run"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "RunConfig"])
def test_every_public_name_has_an_example_that_runs(
    name: str, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vbp.report.html.write_report", lambda folder: folder / "report.html")
    docstring = docstring_of(name)
    assert re.search(r"^    Example:", docstring, re.MULTILINE), f"vbp.{name} has no Example: in its docstring"
    words = set(re.findall(r"\w+", docstring[docstring.index("Example:") :]))
    names = {word: make(tmp_path) for word, make in SHARED.items() if word in words}
    test = doctest.DocTestParser().get_doctest(docstring, {"vbp": vbp, "torch": torch, **names}, name, None, 0)
    assert test.examples, f"the Example: of vbp.{name} has no line that begins with >>>"
    told: list[str] = []
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=told.append).failed == 0, "".join(told)
