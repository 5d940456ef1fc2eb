"""The Torch-Pruning face: the snippet, statistics, compensation, refusals."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from families import Family, randomise_
from named_attention import ATTENTION_NAMES, named_transformer
from torch import Tensor, nn
from torch_pruning_models import all_but, assert_close, convnet, prepared, vit

from vbp import InputError
from vbp.runtime.forward import logits_of
from vbp.torch_pruning import install
from vbp.torch_pruning import install as install_function
from vbp.torch_pruning.importance import VarianceImportance
from vbp.torch_pruning.pruner import VBPPruner

DOCUMENT = Path(__file__).parents[2] / "docs/torch_pruning.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def installed() -> None:
    install()


def mlp(width: int = 8) -> tuple[nn.Sequential, Tensor]:
    """Return two linear layers around an activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 2)).double()
    return model, torch.randn(40, 3, dtype=torch.float64)


def names_for_snippet(model: nn.Module, images: Tensor) -> dict[str, Any]:
    loader = [(images[:2], torch.zeros(2)), (images[2:], torch.zeros(2))]
    return {"torch": torch, "model": model, "train_loader": loader, "device": "cpu", "example_inputs": images[:1]}


def test_the_snippet_runs_as_written() -> None:
    model, images = convnet("resnet-basic")
    names = names_for_snippet(model, images)
    total = sum(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
    exec(compile(SNIPPETS[0], str(DOCUMENT), "exec"), names)
    assert type(names["pruner"]) is VBPPruner
    assert type(names["imp"]) is VarianceImportance
    left = sum(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert left < 0.8 * total
    assert model(images).shape == (4, 5)


def test_the_snippets_give_published_vbp_on_a_transformer() -> None:
    model, images = vit()
    names = names_for_snippet(model, images)
    imports = "import torch_pruning as tp\n"
    collect = "imp = tp.importance.VarianceImportance()\nimp.collect_statistics(model, train_loader, device)\n"
    exec(compile(imports + collect + SNIPPETS[1], str(DOCUMENT), "exec"), names)
    widths = [block.mlp.fc1.out_features for block in model.blocks]
    assert sum(widths) == 2 * 96 - round(2 * 96 * 0.35)
    assert [block.mlp.fc2.in_features for block in model.blocks] == widths
    assert all(block.attn.qkv.out_features == 72 for block in model.blocks)


def test_statistics_are_those_of_the_value_that_is_consumed() -> None:
    model, images = mlp()
    importance = VarianceImportance()
    importance.collect_statistics(model.train(), [(images[:15], None), (images[15:], None)])
    with torch.no_grad():
        hidden = model[1](model[0](images))
    torch.testing.assert_close(importance.variance[model[0]], hidden.var(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(importance.means[model[0]], hidden.mean(0), rtol=1e-12, atol=1e-14)
    assert list(importance.variance) == [model[0]]
    assert list(importance.means.inputs) == [model[2]]
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_several_consumers_and_positions_are_averaged() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 1)
            self.left, self.right = nn.Linear(6 * 4, 2), nn.Conv2d(6, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.first(images)
            left: Tensor = self.left(hidden.tanh().flatten(1))
            return left + self.right(hidden.relu()).mean((2, 3))

    torch.manual_seed(0)
    model, images = Two().double(), torch.randn(20, 3, 2, 2, dtype=torch.float64)
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    with torch.no_grad():
        hidden = model.first(images)
    left = hidden.tanh().flatten(2).var(0).mean(1)
    right = hidden.relu().movedim(1, 0).flatten(1).var(1)
    torch.testing.assert_close(importance.variance[model.first], (left + right) / 2, rtol=1e-12, atol=1e-14)
    pruner, _, clamped = prepared(model, images, ignored_layers=[model.left, model.right])
    pruner.step()
    assert_close(model(images), clamped(images))
    assert model.left.in_features == 4 * model.first.out_channels


TRANSFORMERS = (
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_equal_the_clamped_dense_model(name: str) -> None:
    """Kin to reports of DINOv3 models whose rotary embedding a graph of dependencies cannot follow."""
    model, images = vit(name)
    pruner, _, clamped = prepared(model, images, ignored_layers=all_but(model, ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")))
    pruner.step()
    with torch.no_grad():
        assert_close(model(images), clamped(images))
    for block in model.blocks:
        # EVA-02 packs gate and value into one layer: they go in pairs.
        first = block.mlp.fc1_x if "plus" in name else block.mlp.fc1
        assert first.out_features == block.mlp.fc2.in_features * (2 if "eva02" in name else 1)


FIRST_OF_MLP = ("fc1", "intermediate.dense", "pwconv1", "mlp.0", "mlp.linear_1", "block.3")


def test_every_family_equals_the_clamped_dense_model(family: Family) -> None:
    model, images = randomise_(family.build()).double().eval(), family.example(3)
    first = [name for name, _ in model.named_modules() if name.endswith(FIRST_OF_MLP)]
    ignored = all_but(model, FIRST_OF_MLP)
    pruner, _, clamped = prepared(model, images, ignored_layers=ignored)
    pruner.step()
    with torch.no_grad():
        assert_close(logits_of(model(images)), logits_of(clamped(images)))
    assert len(clamped.removed) == len(first) == family.sites


def test_gates_stay_paired_over_steps() -> None:
    model, images = vit("eva02_tiny_patch14_224")
    arguments = {"ignored_layers": all_but(model, "mlp.fc1"), "iterative_steps": 3, "pruning_ratio": 0.6}
    pruner, _, _ = prepared(model, images, **arguments)
    total = sum(block.mlp.fc2.in_features for block in model.blocks)
    for step in (1, 2, 3):
        pruner.step()
        left = sum(block.mlp.fc2.in_features for block in model.blocks)
        assert abs(left - total * (1 - 0.2 * step)) <= 1
        assert model(images).isfinite().all()


def test_a_residual_stream_behind_layernorm_warns_once_and_runs() -> None:
    model, images = vit()
    head = [layer for name, layer in model.named_modules() if name.endswith(("qkv", "fc1", "head"))]
    arguments = {"ignored_layers": head, "iterative_steps": 2, "pruning_ratio": 0.4}
    pruner, _, _ = prepared(model, images, **arguments)
    with pytest.warns(UserWarning, match=r"inexact behind a normalisation over the pruned channels: .*norm"):
        pruner.step()
    pruner.step()
    assert model.embed_dim != model.pos_embed.shape[-1] == model.blocks[0].attn.qkv.in_features
    assert model(images).shape == (4, 5)


def test_target_layers_replace_the_statistics() -> None:
    model, images = mlp()
    importance = VarianceImportance(target_layers=[(model[0], torch.sigmoid)])
    importance.collect_statistics(model, [images])
    with torch.no_grad():
        hidden = model[0](images).sigmoid()
    torch.testing.assert_close(importance.variance[model[0]], hidden.var(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(importance.means[model[0]], hidden.mean(0), rtol=1e-12, atol=1e-14)
    group = next(iter(tp.DependencyGraph().build_dependency(model, images).get_all_groups([model[2]])))
    torch.testing.assert_close(importance(group), hidden.var(0), rtol=1e-12, atol=1e-14)
    wrong = VarianceImportance(target_layers=[(model[2], torch.sigmoid)])
    with pytest.raises(InputError, match="output channels can be pruned, got '2'"):
        wrong.collect_statistics(model, [images])


def test_norm_per_layer_divides_by_the_mean() -> None:
    model, images = mlp()
    plain, normed = VarianceImportance(), VarianceImportance(norm_per_layer=True)
    for importance in (plain, normed):
        importance.collect_statistics(model, [images])
    group = next(iter(tp.DependencyGraph().build_dependency(model, images).get_all_groups([model[2]])))
    torch.testing.assert_close(normed(group), plain(group) / plain(group).mean())
    part = (
        tp.DependencyGraph()
        .build_dependency(model, images)
        .get_pruning_group(model[0], tp.prune_linear_out_channels, [5, 2])
    )
    assert torch.equal(plain(part), plain(group)[[5, 2]])


def test_statistics_travel_by_name(tmp_path: Path) -> None:
    model, images = convnet("resnet-bottleneck")
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    torch.save(importance.state_by_name(model), tmp_path / "statistics.pt")
    twin = copy.deepcopy(model)
    received = VarianceImportance()
    received.load_by_name(twin, torch.load(tmp_path / "statistics.pt"))
    for network, statistics in ((model, importance), (twin, received)):
        VBPPruner(network, images[:1], statistics, pruning_ratio=0.3, mean_dict=statistics.means).step()
    with torch.no_grad():
        assert torch.equal(model(images), twin(images))
    with pytest.raises(InputError, match="statistics must fit Sequential"):
        received.load_by_name(mlp()[0], torch.load(tmp_path / "statistics.pt"))


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("kind", ["vit", "resnet-bottleneck"])
def test_statistics_that_another_process_sent_prune_alike(kind: str, by_name: bool) -> None:
    """Kin to scripts in which rank 0 collects, `imp.variance` and `imp.means` are broadcast, and all ranks prune."""
    model, images = vit() if kind == "vit" else convnet(kind)
    twin = copy.deepcopy(model)
    importance, received = VarianceImportance(), VarianceImportance()
    importance.collect_statistics(model, [images])
    keys: dict[nn.Module, Any] = {layer: name for name, layer in model.named_modules()}
    if not by_name:
        keys = {layer: twin.get_submodule(name) for layer, name in keys.items()}
    received.variance = {keys[layer]: value for layer, value in importance.variance.items()}
    plain = {keys[layer]: value for layer, value in importance.means.items()}
    received.means = plain  # type: ignore[assignment]
    for network, statistics in ((model, importance), (twin, received)):
        ignored = all_but(network, "mlp.fc1") if kind == "vit" else [network.fc]
        arguments = {"pruning_ratio": 0.4, "global_pruning": True, "iterative_steps": 2, "ignored_layers": ignored}
        pruner = VBPPruner(network, images[:1], statistics, mean_dict=statistics.means, **arguments)
        pruner.step()
        pruner.step()
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    if kind == "vit":  # one reader of each channel: the same means
        with torch.no_grad():
            assert torch.equal(model(images), twin(images))
    assert plain == {keys[layer]: plain[keys[layer]] for layer in importance.means}
    received.variance = {"no.such": torch.ones(3)}  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"got those of layers that it lacks: .*no\.such"):
        VBPPruner(twin, images[:1], received, ignored_layers=[]).step(enable_compensation=False)


def test_scores_are_what_the_public_dictionary_holds() -> None:
    model, images = mlp()
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    importance.variance = {model[0]: torch.arange(8).flip(0)}
    group = next(iter(tp.DependencyGraph().build_dependency(model, images).get_all_groups([model[2]])))
    assert importance(group).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_the_arguments_of_other_versions_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    model, images = mlp()
    importance = VarianceImportance(norm_per_layer=True, eps=1e-8, importance_mode="variance")
    importance.collect_statistics(
        model, images.split(5), "cpu", target_layers=[(model[0], torch.relu)], max_batches=2
    )
    with torch.no_grad():
        hidden = model[0](images[:10]).relu()
    torch.testing.assert_close(importance.variance[model[0]], hidden.var(0), rtol=1e-12, atol=1e-14)
    with caplog.at_level("INFO", "vbp"):
        pruner = VBPPruner(model, images[:1], importance, pruning_ratio=0.5, verbose=True)
        pruner.step(enable_compensation=False)
    assert "0 loses 4 channels" in caplog.messages
    with pytest.raises(InputError, match="max_batches must be at least 1, got 0"):
        importance.collect_statistics(model, [images], max_batches=0)
    with pytest.raises(InputError, match="importance_mode must be 'variance', got 'std'"):
        VarianceImportance(importance_mode="std")  # type: ignore[arg-type]


def test_a_plain_dict_of_means_serves() -> None:
    model, images = mlp()
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    other = copy.deepcopy(model)
    means = {other[0]: importance.means[model[0]].float()}
    scores = tp.importance.MagnitudeImportance(p=1)
    pruner = VBPPruner(other, images[:1], scores, pruning_ratio=0.5, mean_dict=means)
    _, _, clamped = prepared(model, images)
    group = next(iter(pruner.DG.get_all_groups([other[2]])))
    gone = scores(group).argsort()[:4].sort().values.tolist()
    clamped.removed = {"2": gone}
    pruner.step()
    torch.testing.assert_close(other(images), clamped(images), rtol=1e-5, atol=1e-6)
    assert len(means[other[0]]) == 8


def test_torch_prunings_own_pruner_takes_the_importance() -> None:
    model, images = convnet("resnet-bottleneck")
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    pruner = tp.pruner.MagnitudePruner(model, images[:1], importance, pruning_ratio=0.5, ignored_layers=[model.fc])
    before = model.layer1[0].conv1.out_channels
    pruner.step()
    assert model.layer1[0].conv1.out_channels == before // 2
    assert model(images).shape == (4, 5)
    with pytest.raises(InputError, match=r"must cover \d+ channels, got \d+"):
        tp.pruner.MagnitudePruner(model, images[:1], importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()


def test_interactive_pruning_compensates_what_is_pruned() -> None:
    model, images = vit()
    pruner, _, clamped = prepared(
        model, images, ignored_layers=all_but(model, "mlp.fc1"), global_pruning=False, pruning_ratio=0.5
    )
    groups = pruner.step(interactive=True)
    assert groups is not None
    for number, group in enumerate(groups):
        if number == 0:
            group.prune()
    assert [block.mlp.fc1.out_features for block in model.blocks] == [48, 96]
    del clamped.removed["blocks.1.mlp.fc2"]
    with torch.no_grad():
        assert_close(model(images), clamped(images))
    assert len(pruner.pruning_history()) == 1


def test_a_group_can_be_cut_to_other_channels() -> None:
    model, images = mlp()
    pruner, _, clamped = prepared(model, images, pruning_ratio=0.5)
    (group,) = pruner.step(interactive=True) or ()
    group.prune([3, 6])
    clamped.removed = {"2": [3, 6]}
    assert model[0].out_features == 6
    assert_close(model(images), clamped(images))


def test_without_compensation_the_channels_are_just_gone() -> None:
    model, images = mlp()
    bias = model[2].bias.clone()
    pruner, _, _ = prepared(model, images, mean_dict=None)
    with pytest.raises(InputError, match="compensation needs mean_dict, got none"):
        pruner.step()
    pruner.step(enable_compensation=False)
    assert torch.equal(model[2].bias, bias)


@pytest.mark.parametrize("name", ["resnet-basic", "vgg"])
def test_the_mean_check_measures_what_compensation_mends(name: str) -> None:
    report = {}
    for compensated in (True, False):
        model, images = convnet(name)
        model.train()
        first = "layer1.0.conv1" if name == "resnet-basic" else "features.0"
        pruner, _, _ = prepared(model, images, ignored_layers=all_but(model, first))
        pruner.enable_meancheck(model)
        model.eval()
        with torch.no_grad():
            model(images)
        model(images[:2])  # later passes do not count
        pruner.step(enable_compensation=compensated)
        assert not any(module._forward_pre_hooks for module in model.modules())
        report[compensated] = pruner.disable_meancheck()
        assert not any(module._forward_hooks for module in model.modules())
    assert report[True].keys() == report[False].keys() != set()
    for layer in report[True]:
        assert report[True][layer].relative < 1e-10 < 1e-3 < report[False][layer].relative
        assert report[True][layer].absolute < 1e-10


def test_the_mean_check_runs_the_example_inputs_itself() -> None:
    model, images = mlp()
    pruner, _, _ = prepared(model, images)
    pruner.enable_meancheck(model)
    with pytest.raises(InputError, match="on already"):
        pruner.enable_meancheck(model)
    pruner.step()
    assert list(pruner.disable_meancheck()) == ["2"]
    with pytest.raises(InputError, match="not on"):
        pruner.disable_meancheck()
    with pytest.raises(InputError, match="own model"):
        pruner.enable_meancheck(nn.Linear(2, 2))


def test_what_would_break_is_refused_and_nothing_is_modified() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, values: Tensor) -> Tensor:
            hidden = self.first(values)
            mixed = self.second(hidden + hidden.new_ones(8))
            output: Tensor = self.third(mixed.relu())
            return output

    model, images = Fixed().double(), torch.randn(9, 4, dtype=torch.float64)
    pruner, _, _ = prepared(model, images, global_pruning=False, pruning_ratio=0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"pruning first must leave a Fixed that runs, got RuntimeError") as caught:
        pruner.step()
    assert "second" not in str(caught.value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert pruner.current_step == 0
    again, _, clamped = prepared(model, images, global_pruning=False, pruning_ratio=0.5, ignored_layers=[model.first])
    again.step()
    assert_close(model(images), clamped(images))


ATTENTIONS = {
    "vit_tiny_patch16_224": r"got layers whose channels go together, as in an attention: blocks.0.attn.qkv, "
    r"blocks.1.attn.qkv .*give num_heads=.*or put the layers of every attention into ignored_layers",
    "cait_xxs24_224": r"follows 72 channels of blocks.1.attn.qkv into blocks.1.attn.proj_l, which has 2.*"
    r"into ignored_layers \(also refused: blocks.0.attn.qkv\)",
    "vit_small_patch16_dinov3": r"channels of blocks.1.attn.qkv must go in pairs or one by one, .*as in an "
    r"attention; put the layer into ignored_layers, or give num_heads for it \(also refused: blocks.0.attn.qkv\)",
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_without_num_heads_is_refused_in_one_sentence_for_all_of_them(name: str) -> None:
    """Kin to reports of the first lines of a tutorial that fail on a ViT with an index or a shape."""
    model, images = vit(name)
    pruner, _, _ = prepared(model, images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=ATTENTIONS[name]):
        pruner.step()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dims", [True, False])
def test_heads_and_their_channels(dims: bool) -> None:
    model, images = vit()
    heads = {block.attn.qkv: 2 for block in model.blocks}
    pruner, _, _ = prepared(
        model, images, num_heads=heads, ignored_layers=all_but(model, "qkv"), global_pruning=False, pruning_ratio=0.5,
        prune_num_heads=not dims, head_pruning_ratio=0.5, prune_head_dims=dims,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="inexact behind query and key channels"):
        pruner.step()
    for block in model.blocks:
        assert block.attn.qkv.out_features == 3 * block.attn.proj.in_features == 36
        assert (block.attn.num_heads, block.attn.head_dim) == ((2, 6) if dims else (1, 12))
        assert pruner.num_heads[block.attn.qkv] == block.attn.num_heads
        assert block.attn.scale == 12**-0.5
    assert set(heads.values()) == {2}
    assert model(images).shape == (4, 5)


@pytest.mark.parametrize("names", ATTENTION_NAMES)
def test_an_attentions_widths_are_known_under_all_their_names(names: tuple[str, str]) -> None:
    model, images = named_transformer(names)
    heads = dict.fromkeys((model.attn.query, model.attn.key, model.attn.value), 2)
    pruner, _, _ = prepared(
        model, images, num_heads=heads, ignored_layers=[model.embed, model.head, model.attn.proj],
        global_pruning=False, pruning_ratio=0.5, prune_head_dims=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="inexact behind query and key channels"):
        pruner.step()
    assert [getattr(model.attn, name) for name in names] == [6, 12]
    assert model(images).shape == (4, 5)


def test_tracing_failures_are_one_readable_error() -> None:
    class Detached(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            raise RuntimeError("no luck\nand more")

    images = torch.randn(3, 3)
    with pytest.raises(InputError, match=r"could not trace Detached: RuntimeError: no luck; the forward pass must"):
        VBPPruner(Detached(3, 3), images, VarianceImportance())
    with pytest.raises(InputError, match="could not trace Detached"):
        VarianceImportance().collect_statistics(Detached(3, 3), [images])
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        VBPPruner(nn.Linear(3, 3), images, VarianceImportance())
    with torch.no_grad():
        VBPPruner(mlp()[0], mlp()[1], VarianceImportance())


def test_bad_calibration_is_refused() -> None:
    model, images = mlp()
    with pytest.raises(InputError, match="at least one image, got none"):
        VarianceImportance().collect_statistics(model, [])
    with pytest.raises(InputError, match="a batch must be a tensor, a tuple"):
        VarianceImportance().collect_statistics(model, [{0: 1}])
    with pytest.raises(InputError, match=r"activations at 2 must be finite.* got 8 channels"):
        VarianceImportance().collect_statistics(model, [images * torch.nan])
    with pytest.raises(InputError, match="at the input of 2 must cover 8 channels, got none"):
        VBPPruner(model, images, VarianceImportance(), mean_dict={}).step()


def test_installing_leaves_torch_prunings_own_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules[install_function.__module__]
    monkeypatch.setattr(module, "warned", False)
    theirs = type("VBPPruner", (), {})
    monkeypatch.setattr(tp.pruner, "VBPPruner", theirs)
    monkeypatch.delattr(tp.importance, "VarianceImportance")
    with pytest.warns(UserWarning, match=r"brings torch_pruning\.pruner\.VBPPruner itself"):
        install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install()
    assert tp.pruner.VBPPruner is theirs
    assert not hasattr(tp.importance, "VarianceImportance")


class _Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


def _weight_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(inputs, outputs))


@pytest.mark.parametrize("kind", [_Normalised, _weight_norm])
def test_a_layer_whose_weight_is_computed_is_refused_by_name(kind: Callable[[int, int], nn.Module]) -> None:
    """Kin to reports of pruned layers with standardised or parametrized weights that give other outputs, or crash."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), kind(16, 12), nn.ReLU(), nn.Linear(12, 4))
    images = torch.randn(16, 8)
    imp = VarianceImportance()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    imp.collect_statistics(model, [images])
    pruner = VBPPruner(model, images[:1], imp, pruning_ratio=0.5, mean_dict=imp.means, ignored_layers=[model[4]])
    with pytest.raises(InputError, match=r"2 cannot be pruned by its own weight and bias: .*ignored_layers"):
        pruner.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
