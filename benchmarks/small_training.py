"""Small models of several families and recipes, trained on scikit-learn's handwritten digits in a few minutes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

import vbp
from vbp.data import digits
from vbp.data.images import Split, balanced_order
from vbp.runtime.files import write_bytes
from vbp.runtime.fingerprints import json_fingerprint

_CLASSES: Final = 10
_BATCH: Final = 64
_WARMUP_STEPS: Final = 50


@dataclass(frozen=True)
class Recipe:
    """A small model, and how it is trained.

    Attributes:
        label: Its name in the table.
        model_name: A timm model.
        model_kwargs: Passed on to timm.
        steps: Of AdamW, with 64 images each.
        lr: Peak learning rate; a short warm-up before it, a cosine to 0 after it.
        weight_decay: Of AdamW.
        convolutions: Its sites lie between larger kernels.
        planted: Make one channel of the residual stream massive after training, and repair the model by distillation.
    """

    label: str
    model_name: str
    model_kwargs: Mapping[str, Any]
    steps: int = 1000
    lr: float = 1e-3
    weight_decay: float = 0.05
    planted: bool = False
    convolutions: bool = False


_VIT: Final = {"img_size": 32, "patch_size": 8, "num_heads": 2, "weight_init": "jax"}
RECIPES: Final = {
    "vit": Recipe("ViT", "vit_tiny_patch16_224", {**_VIT, "embed_dim": 64, "depth": 4}),
    "vit_deep": Recipe(
        "ViT, deeper",
        "vit_tiny_patch16_224",
        {**_VIT, "embed_dim": 48, "depth": 8, "global_pool": "avg", "drop_path_rate": 0.2, "init_values": 0.1},
        weight_decay=0.5,
    ),
    "vit_massive": Recipe(
        "ViT, massive channel",
        "vit_tiny_patch16_224",
        {**_VIT, "embed_dim": 64, "depth": 6, "drop_path_rate": 0.1},
        weight_decay=0.3,
        planted=True,
    ),
    "convnext": Recipe(
        "ConvNeXt",
        "convnext_tiny",
        {"depths": (2, 2, 2, 1), "dims": (24, 48, 96, 96), "patch_size": 2, "ls_init_value": 0.1},
        lr=2e-3,
    ),
    "swin": Recipe(
        "Swin",
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 2),
            "num_heads": (2, 4, 8), "weight_init": "jax",
        },
    ),
    "mobilenet": Recipe("MobileNetV2", "mobilenetv2_050", {}, steps=600, lr=2e-3),
    "mobilevit": Recipe("MobileViT", "mobilevit_xxs", {}, steps=600, lr=2e-3),
    "resnet": Recipe("ResNet", "resnet18", {"channels": (16, 32, 64, 128)}, lr=2e-3, convolutions=True),
}  # fmt: skip


@dataclass(frozen=True)
class Images:
    """A split in memory."""

    pixels: Tensor
    labels: Tensor


def load(data_path: Path, split: Split, seed: int) -> Images:
    """Decode a split in the order in which `vbp run` takes calibration images."""
    images = vbp.list_images(data_path, split, _CLASSES)
    images = images.select(list(balanced_order(images, seed)))
    transform = vbp.evaluation_transform(digits.PREPROCESSING)
    batches = list(vbp.make_loader(images, transform, batch_size=_BATCH, num_workers=0))
    return Images(torch.cat([pixels for pixels, _ in batches]), torch.cat([labels for _, labels in batches]))


def augmented(pixels: Tensor) -> Tensor:
    """Turn, scale and shift each image a little, and add noise."""
    turn = 0.25 * (2 * torch.rand(len(pixels)) - 1)
    scale = 0.8 + 0.35 * torch.rand(len(pixels))
    shift = 0.15 * (2 * torch.rand(len(pixels), 2) - 1)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    maps = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * torch.randn_like(moved)


def fit_(model: nn.Module, train: Images, recipe: Recipe, teacher: nn.Module | None = None) -> None:
    """Train a model on the labels, or on the answers of a teacher; the last step's weights are the result."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in range(recipe.steps):
        chosen = torch.randint(len(train.pixels), (_BATCH,))
        pixels = augmented(train.pixels[chosen])
        if teacher is None:
            loss = F.cross_entropy(model(pixels), train.labels[chosen])
        else:
            with torch.no_grad():
                wanted = teacher(pixels).softmax(-1)
            loss = F.kl_div(model(pixels).log_softmax(-1), wanted, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    model.eval()


@torch.no_grad()
def plant_massive_channel_(vit: Any, channel: int = 7, factor: float = 20.0, offset: float = 30.0) -> None:
    """Let one channel of the residual stream be large from the middle on, as trained ViTs often have one.

    The norms that follow shrink the channel again, but divide all others by a larger standard deviation: the
    model needs repair.
    """
    middle = len(vit.blocks) // 2
    for block in vit.blocks[middle:]:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight[channel] *= factor
            layer.bias[channel] *= factor
    vit.blocks[middle].mlp.fc2.bias[channel] += offset
    for norm in (vit.norm, *(norm for block in vit.blocks[middle + 1 :] for norm in (block.norm1, block.norm2))):
        norm.weight[channel] /= factor


def trained(name: str, train: Images, folder: Path | None, seed: int) -> nn.Module:
    """Train a model by its recipe, or read the weights that an earlier call kept."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(recipe.model_name, num_classes=_CLASSES, **recipe.model_kwargs)
    # Weights of another recipe have another name.
    mark = json_fingerprint([asdict(recipe), seed])[:8]
    path = None if folder is None else folder / f"{name}_{mark}.safetensors"
    if path is not None and path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    start = time.perf_counter()
    fit_(model, train, recipe)
    if recipe.planted:
        teacher = copy.deepcopy(model)
        plant_massive_channel_(model)
        fit_(model, train, replace(recipe, steps=500, lr=3e-4, weight_decay=0.05), teacher)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(model.state_dict()))
    return model
