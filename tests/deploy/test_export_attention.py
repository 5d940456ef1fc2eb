"""Models whose attention is cut in its principal basis give the same logits from their exported files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from attentions import Classifier, Interleaved, Separate, rotary
from families import FAMILIES, randomise_
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

import vbp
from vbp.deploy.export import ExportFormat, export_model, open_exported
from vbp.pruning.plan import SitePlan, first_of_heads

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 7}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": FAMILIES["timm-vit"].build,
    "windows": FAMILIES["hf-swin"].build,
    "head by head": lambda: Classifier(Interleaved(value_size=8, separate=True)),
    "rotary": lambda: Classifier(Separate(rotary)),
    "MultiheadAttention": lambda: VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=7),
    "torchvision Swin": lambda: SwinTransformer([4, 4], 16, [2], [2], [4, 4], stochastic_depth_prob=0, num_classes=7),
    "BEiT": lambda: timm.create_model("beit_base_patch16_224", **_VIT),
}


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("fused", "pt2"), ("windows", "pt2"), ("head by head", "onnx"), ("rotary", "pt2"),
        ("MultiheadAttention", "onnx"), ("torchvision Swin", "pt2"), ("BEiT", "onnx"),
    ],
)  # fmt: skip
def test_the_file_gives_the_logits_of_the_pruned_model(name: str, to: ExportFormat, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise_(MODELS[name]()).eval()
    vbp.split_attention_(model)
    size = 6 if isinstance(model, Classifier) else 32
    images = torch.randn(4, 3, size, size)
    sites = [one for one in vbp.find_sites(model, images[:1], attention=True) if one.kind != "mlp"]
    statistics = vbp.collect_statistics(model, sites, [images], covariance=True)
    entries = [SitePlan(site, first_of_heads(site, site.hidden // site.heads // 2), "principal") for site in sites]
    plan = vbp.PruningPlan(tuple(entries), 1.0, "per_layer", attn_keep_ratio=0.5)
    dense = copy.deepcopy(model)
    vbp.prune_(model, plan, statistics.means, statistics.covariances)
    report = export_model(model, images, tmp_path / f"model.{to}", to=to)
    exported = open_exported(report.file)
    for count in (1, 3):
        expected = logits(model, images[:count])
        torch.testing.assert_close(
            logits(exported, images[:count]), expected, rtol=1e-4, atol=1e-5 * expected.abs().max()
        )
    assert vbp.count_macs(model, images[:1]) < vbp.count_macs(dense, images[:1])


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits without gradients."""
    with torch.inference_mode():
        output = model(images)
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[no-any-return]
