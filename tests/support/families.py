"""Small models of each family: random weights, CPU, a few milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """How to build a small model of a family, and what it must have."""

    build: Callable[[], nn.Module]
    size: int
    sites: int

    def example(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return random images."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=dtype)


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=7, **arguments)


def _hugging_face(kind: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(num_labels=7, **arguments)
        model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
        return model

    return build


def _torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        if name == "vit":
            vit: nn.Module = torchvision.models.VisionTransformer(
                image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7
            )
            return vit
        if name == "swin":
            swin: nn.Module = torchvision.models.SwinTransformer(
                [4, 4], 16, [1, 1], [2, 2], [4, 4], mlp_ratio=2.0, num_classes=7, stochastic_depth_prob=0.0
            )
            return swin
        convnext: nn.Module = torchvision.models.ConvNeXt(
            [
                torchvision.models.convnext.CNBlockConfig(16, 32, 1),
                torchvision.models.convnext.CNBlockConfig(32, None, 1),
            ],
            num_classes=7,
        )
        return convnext

    return build


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


_SWIN = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)}


_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


_HF_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


FAMILIES = {
    "timm-vit": Family(_timm("vit_tiny_patch16_224", **_VIT), 32, 2),
    "timm-deit": Family(_timm("deit_tiny_distilled_patch16_224", **_VIT), 32, 2),
    "timm-swin": Family(_timm("swin_tiny_patch4_window7_224", **_SWIN), 64, 3),
    "timm-convnext-linear": Family(_timm("convnext_tiny", conv_mlp=False, **_CONVNEXT), 64, 5),
    "timm-convnext-conv": Family(_timm("convnext_tiny", conv_mlp=True, **_CONVNEXT), 64, 5),
    "hf-vit": Family(_hugging_face("ViT", **_HF_VIT), 32, 2),
    "hf-deit": Family(_hugging_face("DeiT", **_HF_VIT), 32, 2),
    "hf-swin": Family(
        _hugging_face(
            "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        32,
        2,
    ),
    "hf-convnext": Family(
        _hugging_face("ConvNext", image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]), 64, 5
    ),
    "torchvision-vit": Family(_torchvision("vit"), 32, 2),
    "torchvision-swin": Family(_torchvision("swin"), 64, 2),
    "torchvision-convnext": Family(_torchvision("convnext"), 64, 2),
}


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a model weights and biases of one size, so that no LayerScale of 1e-6 hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1) * 0.2)
    return model
