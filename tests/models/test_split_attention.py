"""Attentions that get layers of their own: nothing else changes, and then they are pruned like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from families import randomise_
from torch import Tensor, nn

import vbp
from vbp import (
    InputError,
    PruningPlan,
    SitePlan,
    collect_statistics,
    find_sites,
    load_pruned,
    prune_,
    save_pruned,
    split_attention_,
)
from vbp.pruning.attention import rotate_
from vbp.pruning.plan import first_of_heads

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
SWIN = {
    **{"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]},
    "num_classes": 7,
}


def of_timm(name: str, **arguments: object) -> Callable[[], nn.Module]:
    """Return what builds a small model of timm."""
    return lambda: timm.create_model(name, **arguments)


def of_torchvision(kind: str) -> Callable[[], nn.Module]:
    """Return what builds a small model of torchvision."""

    def build() -> nn.Module:
        from torchvision.models import SwinTransformer, VisionTransformer
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

        if kind == "vit":
            return VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=7)
        parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if kind == "swin_v2" else {}
        # Windows of 4 and 6: with and without padding, the second stage smaller than a window.
        return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 6], stochastic_depth_prob=0, num_classes=7, **parts)

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision-vit": of_torchvision("vit"),
    "torchvision-swin": of_torchvision("swin"),
    "torchvision-swin_v2": of_torchvision("swin_v2"),
    "timm-beit": of_timm("beit_base_patch16_224", **VIT),
    "timm-beitv2, one bias for all blocks": of_timm("beit_base_patch16_224", **VIT, use_shared_rel_pos_bias=True),
    "timm-dinov3": of_timm("vit_small_patch16_dinov3", **VIT),
    "timm-eva02, fused": of_timm("eva02_tiny_patch14_224", **VIT),
    "timm-eva02, separate": of_timm("eva02_base_patch14_224", **VIT),
    "timm-swin_v2": of_timm("swinv2_tiny_window8_256", **SWIN),
}
VALUES_ALONE = {"torchvision-swin_v2", "timm-dinov3", "timm-eva02, fused", "timm-eva02, separate", "timm-swin_v2"}


def prepared(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a float64 model, the same one split, and images."""
    torch.manual_seed(0)
    model = randomise_(MODELS[name]()).double().eval()
    size = 64 if "torchvision" in name or "swin" in name else 32
    split = copy.deepcopy(model)
    names = split_attention_(split)
    assert names
    assert all(isinstance(split.get_submodule(f"{one}.query"), nn.Linear) for one in names)
    return model, split, torch.randn(3, 3, size, size, dtype=torch.float64)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits without gradients."""
    with torch.no_grad():
        found: Tensor = model(images)
        return found


@pytest.mark.parametrize("name", MODELS)
def test_split_attentions_compute_what_they_did_and_are_cut(name: str, tmp_path: Path) -> None:
    model, split, images = prepared(name)
    expected = logits(model, images)
    torch.testing.assert_close(logits(split, images), expected, rtol=0, atol=1e-10)
    assert split_attention_(split) == ()
    sites = tuple(site for site in find_sites(split, images[:1], attention=True) if site.kind != "mlp")
    kinds = [site.kind for site in sites]
    assert kinds.count("value") == len(split_attention_(copy.deepcopy(model)))
    assert kinds.count("query_key") == (0 if name in VALUES_ALONE else kinds.count("value"))
    assert all(site.separate for site in sites)
    statistics = collect_statistics(split, sites, [images], covariance=True)
    assert all(site.rotatable for site in sites)
    turned = copy.deepcopy(split)
    whole = [SitePlan(site, tuple(range(site.hidden)), "principal") for site in sites]
    rotate_(turned, whole, statistics.means, statistics.covariances)
    torch.testing.assert_close(logits(turned, images), expected, rtol=0, atol=1e-10)
    entries = []
    for site in sites:
        size = site.hidden // site.heads
        kept = first_of_heads(site, size // 2 if site.kind == "value" else size // 4)
        entries.append(SitePlan(site, kept, "principal"))
    plan = PruningPlan(tuple(entries), 1.0, "per_layer", attn_keep_ratio=0.5)
    prune_(split, plan, statistics.means, statistics.covariances)
    assert logits(split, images).isfinite().all()
    save_pruned(split, tmp_path / "m.pth", plans=plan)
    loaded = load_pruned(tmp_path / "m.pth", model=MODELS[name]().double())
    assert torch.equal(logits(loaded, images), logits(split, images))


def test_a_model_that_is_not_split_is_refused_with_the_remedy() -> None:
    model, _, images = prepared("torchvision-vit")
    with pytest.raises(InputError, match=r"vbp\.split_attention_\(model\) gives"):
        find_sites(model, images[:1], attention=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_the_call_is_that_of_multihead_attention(batch_first: bool, weights: bool) -> None:
    """Masks of both kinds and shapes, other widths of keys and values, one sequence without a batch."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=batch_first, dtype=torch.float64)
    nn.init.normal_(holder.attn.in_proj_bias)
    before = holder.attn
    state = torch.random.get_rng_state()
    assert split_attention_(holder) == ("attn",)
    assert torch.equal(torch.random.get_rng_state(), state)
    given = [torch.randn(3, tokens, width, dtype=torch.float64) for tokens, width in ((5, 8), (7, 6), (7, 4))]
    if not batch_first:
        given = [one.transpose(0, 1) for one in given]
    padding = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [3]])
    for mask in (None, torch.rand(5, 7) > 0.8, torch.randn(6, 5, 7, dtype=torch.float64)):
        for pad in (None, padding):
            if mask is not None and pad is not None and mask.dtype != pad.dtype:
                continue  # the library warns
            for average in (True, False):
                options = {"attn_mask": mask, "key_padding_mask": pad, "average_attn_weights": average}
                expected, found = (one(*given, need_weights=weights, **options) for one in (before, holder.attn))
                torch.testing.assert_close(found[0], expected[0])
                assert (found[1] is None) is (expected[1] is None)
                if weights:
                    torch.testing.assert_close(found[1], expected[1])
    single = [one.select(0 if batch_first else 1, 1) for one in given]
    torch.testing.assert_close(holder.attn(*single)[0], before(*single)[0])


def test_an_encoder_of_torch_runs_as_before() -> None:
    """Its layers have a fused path for weights of one width; one layer that runs twice is split once."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2).eval()
    model.layers[1] = model.layers[0]
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = logits(model, tokens)
    assert split_attention_(model) == ("layers.0.self_attn",)
    assert model.layers[0].self_attn is model.layers[1].self_attn
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-12)


def test_what_learns_and_what_does_not_stays_so() -> None:
    model = MODELS["torchvision-vit"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("in_proj" not in name)
    count = vbp.count_parameters(model)
    split_attention_(model)
    assert vbp.count_parameters(model) == count
    frozen = {name.rsplit(".", 2)[1] for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {"query", "key", "value"}
    model.train()
    assert model(torch.randn(2, 3, 64, 64)).requires_grad
