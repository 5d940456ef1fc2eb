"""A model loaded from an artefact is a model like any other: it trains, is pruned again, copied, compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from pruned_models import logits, pruned_in_place
from torch import nn

from vbp import find_sites, load_pruned, read_artifact, save_pruned
from vbp.runtime.forward import logits_of

SOME = ("timm-vit", "timm-swin", "timm-convnext-linear", "timm-convnext-conv", "hf-vit", "hf-swin")


@pytest.fixture(params=SOME)
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of each of a few families."""
    return str(request.param)


@pytest.fixture
def loaded(name: str, tmp_path: Path) -> nn.Module:
    """Return a pruned model of a family, loaded from its folder."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.build()
    save_pruned(model, tmp_path / "m", plans=pruned_in_place(model, family.example(2, torch.float32)))
    return load_pruned(tmp_path / "m", model=family.build())


def trained_loss(model: nn.Module, images: torch.Tensor, steps: int = 5) -> tuple[float, float]:
    """Train a few steps, and give the loss before and after."""
    model.eval()  # without dropout and batch statistics the loss must fall
    labels = torch.arange(len(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps + 1):
        loss = nn.functional.cross_entropy(logits_of(model(images)), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
        optimizer.step()
    return losses[0], losses[-1]


def test_it_trains_and_comes_back_trained(name: str, loaded: nn.Module, tmp_path: Path) -> None:
    images = FAMILIES[name].example(2, torch.float32)
    assert all(value.requires_grad and value.is_leaf for value in loaded.parameters())
    before, after = trained_loss(loaded, images)
    assert after < before
    plans = read_artifact(tmp_path / "m").plans
    save_pruned(loaded, tmp_path / "m", plans=plans)
    again = load_pruned(tmp_path / "m", model=FAMILIES[name].build())
    assert torch.equal(logits(again, images), logits(loaded, images))


def test_pruning_again_composes(name: str, loaded: nn.Module, tmp_path: Path) -> None:
    family = FAMILIES[name]
    images = family.example(2, torch.float32)
    plans = read_artifact(tmp_path / "m").plans
    sites = find_sites(loaded, images[:1])
    assert {site.name: site.hidden for site in sites} == {site: kept for site, (kept, _) in plans[0].widths.items()}
    second = pruned_in_place(loaded, images, 0.5)
    assert second.kept == round(plans[0].kept * 0.5)
    save_pruned(loaded, tmp_path / "again", plans=(*plans, second))
    twice = load_pruned(tmp_path / "again", model=family.build())
    assert torch.equal(logits(twice, images), logits(loaded, images))
    assert read_artifact(tmp_path / "again").plans == (*plans, second)


@pytest.mark.parametrize("name", ["timm-vit", "hf-swin"])
def test_attention_too_is_pruned_again(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.example(2, torch.float32)
    plans = [
        pruned_in_place(model, images, 0.75, attention=True),
        pruned_in_place(model, images, 0.5, attention=True),
    ]
    save_pruned(model, tmp_path / "m", plans=plans)
    assert torch.equal(logits(load_pruned(tmp_path / "m", model=family.build()), images), logits(model, images))


def test_copies_and_state_dicts_agree(name: str, loaded: nn.Module, tmp_path: Path) -> None:
    images = FAMILIES[name].example(2, torch.float32)
    expected = logits(loaded, images)
    twin = copy.deepcopy(loaded)
    with torch.no_grad():
        for value in loaded.parameters():
            value.zero_()
    assert torch.equal(logits(twin, images), expected)
    other = load_pruned(tmp_path / "m", model=FAMILIES[name].build())
    loaded.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(logits(loaded, images), expected)


def test_channels_last_gives_the_same(name: str, loaded: nn.Module) -> None:
    images = FAMILIES[name].example(2)
    loaded.double()
    expected = logits(loaded, images)
    loaded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(
        logits(loaded, images.to(memory_format=torch.channels_last)), expected, rtol=1e-10, atol=1e-10
    )


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """Return a process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # depthwise kernels, whose strides are ambiguous
@pytest.mark.parametrize("name", ["timm-swin", "timm-convnext-conv", "hf-vit"])
def test_it_trains_in_ddp_and_is_saved_from_within(name: str, loaded: nn.Module, tmp_path: Path) -> None:
    images = FAMILIES[name].example(2, torch.float32)
    wrapped = nn.parallel.DistributedDataParallel(loaded)
    before, after = trained_loss(wrapped, images, 2)
    assert after < before
    save_pruned(wrapped, tmp_path / "ddp", plans=read_artifact(tmp_path / "m").plans)
    again = load_pruned(tmp_path / "ddp", model=FAMILIES[name].build())
    assert torch.equal(logits(again, images), logits(loaded, images))


# Code generation of the default backend takes minutes and knows nothing of pruning; what may break is the graph.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["timm-swin", "hf-vit"])
def test_it_compiles_as_one_graph_and_is_saved_from_within(name: str, loaded: nn.Module, tmp_path: Path) -> None:
    images = FAMILIES[name].example(2, torch.float32)
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, images), logits(loaded, images), rtol=1e-4, atol=1e-5)
    save_pruned(compiled, tmp_path / "compiled", plans=read_artifact(tmp_path / "m").plans)
    again = load_pruned(tmp_path / "compiled", model=FAMILIES[name].build())
    assert torch.equal(logits(again, images), logits(loaded, images))
