"""What the pruner removes: exact counts where Torch-Pruning's are not; nothing is shared between pruners."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_pruning_models import all_but, convnet, prepared, vit

from vbp import InputError
from vbp.torch_pruning.importance import VarianceImportance
from vbp.torch_pruning.planning import Stack, allocate, candidates
from vbp.torch_pruning.pruner import VBPPruner


class Given(tp.importance.Importance):  # type: ignore[misc]
    """Scores by layer."""

    def __init__(self, scores: dict[nn.Module, Tensor]) -> None:
        self.scores = scores

    def __call__(self, group: Any) -> Tensor:
        layer = group[0].dep.target.module
        return self.scores[layer][: len(group[0].idxs)].double()


def chain(*widths: int) -> tuple[nn.Sequential, Tensor]:
    """Return linear layers with these numbers of hidden channels between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width, following in zip((3, *widths), (*widths, 2), strict=True):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(5, 3)


def widths(model: nn.Sequential) -> list[int]:
    return [layer.out_features for layer in model if isinstance(layer, nn.Linear)][:-1]


def pruner_of(model: nn.Sequential, scores: dict[nn.Module, Tensor], **arguments: Any) -> VBPPruner:
    defaults = {"global_pruning": True, "pruning_ratio": 0.2}
    return VBPPruner(model, torch.randn(1, 3), Given(scores), **{**defaults, **arguments})


def cut(pruner: VBPPruner) -> None:
    pruner.step(enable_compensation=False)


def test_ties_remove_the_number_asked_in_the_order_of_layers() -> None:
    model, _ = chain(50, 50)
    scores = {model[0]: torch.ones(50), model[2]: torch.ones(50)}
    scores[model[0]][:30] = scores[model[2]][:30] = 0
    kept = model[0].weight[20:].clone()
    cut(pruner_of(model, scores))
    assert widths(model) == [30, 50]
    assert torch.equal(model[0].weight, kept)


def test_a_layer_wholly_below_the_threshold_is_cut_to_its_floor() -> None:
    model, _ = chain(100, 100)
    cut(pruner_of(model, {model[0]: torch.zeros(100), model[2]: torch.arange(100) + 1.0}, pruning_ratio=0.55))
    assert widths(model) == [1, 89]


@pytest.mark.parametrize("together", [True, False])
def test_max_pruning_ratio_holds_for_every_layer(together: bool) -> None:
    model, _ = chain(100, 100)
    scores = {model[0]: torch.zeros(100), model[2]: torch.arange(100) + 1.0}
    cut(pruner_of(model, scores, pruning_ratio=0.6, max_pruning_ratio=0.5, global_pruning=together))
    assert widths(model) == [50, 50]


@pytest.mark.parametrize("ratio", [0.004, 0.0333, 0.35, 0.999, 1.0])
def test_the_count_is_the_rounded_share(ratio: float) -> None:
    model, _ = chain(60, 70)
    torch.manual_seed(1)
    cut(pruner_of(model, {model[0]: torch.rand(60), model[2]: torch.rand(70)}, pruning_ratio=ratio))
    assert sum(widths(model)) == max(2, 130 - round(130 * ratio))


def test_a_step_that_removes_nothing_is_an_error_and_can_be_repeated() -> None:
    model, _ = chain(60, 70)
    for arguments in ({"pruning_ratio": 0.003}, {"pruning_ratio": 0.5, "max_pruning_ratio": 0.0}):
        pruner = pruner_of(model, {model[0]: torch.rand(60), model[2]: torch.rand(70)}, **arguments)
        with pytest.raises(InputError, match="step 1 must remove channels, got none"):
            cut(pruner)
        assert pruner.current_step == 0
    assert widths(model) == [60, 70]
    everything = pruner_of(model, {}, ignored_layers=[nn.Linear])
    with pytest.raises(InputError, match="must remove channels, got none"):
        cut(everything)
    done = pruner_of(model, {model[0]: torch.rand(60), model[2]: torch.rand(70)})
    cut(done)
    with pytest.raises(InputError, match="iterative_steps=1, got step 2"):
        cut(done)


def test_iterative_steps_add_up_exactly() -> None:
    model, images = convnet("resnet-bottleneck")
    pruner, _, _ = prepared(model, images, iterative_steps=4, pruning_ratio=0.3)

    def total() -> int:
        return sum(len(one.coupling.channels) for one in candidates(pruner))

    before = total()
    for step in range(1, 5):
        pruner.step()
        assert total() == before - round(before * 0.3 * step / 4)
    assert model(images).isfinite().all()


def test_local_pruning_gives_each_layer_its_share() -> None:
    model, _ = chain(10, 25, 40)
    scores = {layer: torch.rand(layer.out_features) for layer in model if isinstance(layer, nn.Linear)}
    cut(pruner_of(model, scores, global_pruning=False, pruning_ratio=0.3))
    assert widths(model) == [7, 25 - 8, 28]


def test_layers_with_their_own_ratio() -> None:
    model, _ = chain(20, 20, 20)
    scores = {layer: torch.arange(20.0) for layer in model if isinstance(layer, nn.Linear)}
    own = {model[0]: 0.5, (model[2], model[4]): 0.25}
    cut(pruner_of(model, scores, pruning_ratio=0.9, pruning_ratio_dict=own))
    assert widths(model) == [10, 15, 15]


def test_isomorphic_ranks_groups_of_one_pattern_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 20),
        nn.ReLU(),
        nn.Linear(20, 20),
        nn.ReLU(),
        nn.Linear(20, 20),
        nn.LayerNorm(20),
        nn.Linear(20, 2),
    )
    scores = {model[0]: torch.zeros(20), model[2]: torch.arange(20.0), model[4]: torch.arange(20.0) + 100}
    cut(pruner_of(model, scores, isomorphic=True, pruning_ratio=0.25))
    assert widths(model) == [10, 20, 15]
    with pytest.raises(InputError, match=r"isomorphic .* got global_pruning=False"):
        pruner_of(model, scores, isomorphic=True, global_pruning=False)


def test_round_to_takes_the_nearest_multiple_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = chain(30, 64)
    scores = {model[0]: torch.arange(30.0), model[2]: torch.arange(64.0) + 12}
    with caplog.at_level(logging.WARNING, "vbp.torch_pruning"):
        cut(pruner_of(model, scores, round_to=8, pruning_ratio=0.35))
    # A layer that loses channels keeps a multiple; one that loses none stays as it is.
    assert all(width % 8 == 0 or width == 30 for width in widths(model))
    removed = 94 - sum(widths(model))
    assert abs(removed - 33) <= 4
    assert f"asked to remove 33 channels of 0, 2, the nearest that max_pruning_ratio, round_to and channel groups allow is {removed}" in caplog.text  # noqa: E501  # fmt: skip


def test_the_classifier_stays_whole() -> None:
    model, images = chain(10)
    VBPPruner(model, images, tp.importance.MagnitudeImportance(), pruning_ratio=0.5).step(enable_compensation=False)
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [5, 2]


@pytest.mark.parametrize("kind", ["MagnitudeImportance", "RandomImportance", "LAMPImportance", "FPGMImportance"])
def test_other_importances_in_the_pruner(kind: str) -> None:
    model, images = convnet("resnet-basic")
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    other = getattr(tp.importance, kind)()
    before = sum(parameter.numel() for parameter in model.parameters())
    VBPPruner(model, images[:1], other, global_pruning=True, pruning_ratio=0.3, mean_dict=importance.means).step()
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert model(images).shape == (4, 5)


def test_a_second_pruner_sees_nothing_of_the_first() -> None:
    defaults = inspect.signature(tp.pruner.BasePruner.__init__).parameters
    shared = {name: value.default for name, value in defaults.items() if isinstance(value.default, dict)}
    before = {name: dict(value) for name, value in shared.items()}
    first, images = convnet("resnext-grouped")
    heads: dict[nn.Module, int] = {}
    one, _, _ = prepared(first, images, num_heads=heads)
    one.step()
    assert one.in_channel_groups
    second, images = convnet("resnet-basic")
    two, _, _ = prepared(second, images)
    assert not two.in_channel_groups
    assert not two.out_channel_groups
    assert not two.num_heads
    assert {name: dict(value) for name, value in shared.items()} == before
    assert heads == {}


def test_the_callers_containers_are_not_written_to() -> None:
    model, images = vit()
    unwrapped = {model.pos_embed: 2, model.cls_token: 2}
    heads, groups = {model.blocks[0].attn.qkv: 2}, {model.blocks[0].attn.qkv: 2}
    pruner, importance, _ = prepared(
        model, images, unwrapped_parameters=unwrapped, num_heads=heads, out_channel_groups=groups,
        ignored_layers=all_but(model, "mlp.fc1"),
    )  # fmt: skip
    means = dict(importance.means)
    pruner.step()
    assert list(unwrapped.values()) == [2, 2]
    assert heads == groups == {model.blocks[0].attn.qkv: 2}
    assert pruner.mean_dict is not importance.means
    assert len(means[model.blocks[0].mlp.fc1]) == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_ratio": 1.3}, r"pruning_ratio must be in \[0, 1\], got 1.3"),
        ({"max_pruning_ratio": -0.1}, r"max_pruning_ratio must be in \[0, 1\], got -0.1"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"iterative_steps": 0}, "iterative_steps must be at least 1, got 0"),
        ({"ignored_layers": ["fc1"]}, "ignored_layers must hold modules, parameters or module types, got 'fc1'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model, _ = chain(4)
    with pytest.raises(InputError, match=message):
        pruner_of(model, {}, **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ratio'"):
        pruner_of(model, {}, ratio=0.5)


def test_scores_must_be_finite_and_complete() -> None:
    model, _ = chain(4)
    for scores in (torch.tensor([1, torch.nan, 2, 3]), torch.ones(3)):
        with pytest.raises(InputError, match="importance of 0 must be 4 finite numbers"):
            cut(pruner_of(model, {model[0]: scores}))
    assert widths(model) == [4]


stacks = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 12)), min_size=1
)


@given(stacks, st.integers(0, 60), st.integers(1, 4))
def test_allocation_is_exact_where_it_can_be(drawn: list[tuple[list[int], int, int]], budget: int, step: int) -> None:
    given_stacks = [
        Stack(torch.tensor(scores, dtype=torch.float64), width, min(most, len(scores) - 1), step)
        for scores, width, most in drawn
    ]
    chosen, removed = allocate(given_stacks, budget)
    assert removed == sum(len(gone) * stack.width for gone, stack in zip(chosen, given_stacks, strict=True))
    for gone, stack in zip(chosen, given_stacks, strict=True):
        left = len(stack.scores) - len(gone)
        assert len(gone) <= stack.removable
        assert left >= 1
        assert not len(gone) or left % step == 0
        if len(gone):
            assert stack.scores[gone].max() <= stack.scores.sort().values[len(gone) - 1]
    if step == 1 and all(stack.width == 1 for stack in given_stacks):
        assert removed == min(budget, sum(stack.removable for stack in given_stacks))


def test_a_norm_keeps_the_order_of_its_channels() -> None:
    """Torch-Pruning 1.6.1 permutes weight and bias where few channels of a wide LayerNorm stay."""
    model = nn.Sequential(nn.Linear(3, 128), nn.LayerNorm(128), nn.Linear(128, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(128.0))
        model[1].bias.copy_(-torch.arange(128.0))
    scores = {model[0]: torch.rand(128, generator=torch.Generator().manual_seed(0))}
    kept = scores[model[0]].argsort()[-6:].sort().values.float()
    cut(pruner_of(model, scores, pruning_ratio=122 / 128))
    assert torch.equal(model[1].weight, kept)
    assert torch.equal(model[1].bias, -kept)
