"""Models and comparisons of the tests of the Torch-Pruning face."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from families import randomise_
from timm.models.efficientnet import _gen_efficientnet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from vbp.torch_pruning.compensate import reestimate_batchnorm_
from vbp.torch_pruning.graph import read_group
from vbp.torch_pruning.importance import VarianceImportance
from vbp.torch_pruning.pruner import VBPPruner


def _resnet(block: type[nn.Module], width: int, **arguments: Any) -> nn.Module:
    channels = tuple(width + 4 * stage for stage in range(4))
    model: nn.Module = ResNet(block, [1, 1, 1, 1], channels=channels, num_classes=5, **arguments)
    return model


def _vgg(batch_norm: bool) -> nn.Module:
    layers = torchvision.models.vgg.make_layers([8, "M", 12, "M", 16], batch_norm=batch_norm)
    with torch.device("meta"):  # its classifier alone would take 400 MB
        model: nn.Module = torchvision.models.VGG(layers, num_classes=5, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5))
    return model


def _efficientnet() -> nn.Module:
    model: nn.Module = _gen_efficientnet(
        "efficientnet_b0", channel_multiplier=0.2, depth_multiplier=0.2, num_classes=5
    )
    return model


CONVNETS: dict[str, Callable[[], nn.Module]] = {
    "resnet-basic": lambda: _resnet(BasicBlock, 12),
    "resnet-bottleneck": lambda: _resnet(Bottleneck, 8),
    "resnext-grouped": lambda: _resnet(Bottleneck, 16, cardinality=4, base_width=32),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=5),
    "mobilenetv2-torchvision": lambda: torchvision.models.mobilenet_v2(width_mult=0.2, num_classes=5, dropout=0.0),
    "efficientnet": _efficientnet,
    "vgg": lambda: _vgg(False),
    "vgg-batchnorm": lambda: _vgg(True),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
}


# Their convolutions that read pruned channels are 1x1: zero padding never meets a pruned channel.
POINTWISE = ("mobilenetv2", "mobilenetv2-torchvision", "efficientnet")


def wrap_borders_(model: nn.Module) -> nn.Module:
    """Let padded convolutions continue at the opposite border: a constant channel is constant up to the border."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str) and any(layer.padding):
            layer.padding_mode = "circular"
    return model


def convnet(name: str, wrap: bool = True) -> tuple[nn.Module, Tensor]:
    """Return a float64 network whose activations are of size one, and images."""
    torch.manual_seed(0)
    model, images = CONVNETS[name](), torch.randn(4, 3, 32, 32)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    if wrap:
        wrap_borders_(model)
    model.double().eval()
    if any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        reestimate_batchnorm_(model, [images.double()])
    return model, images.double()


def vit(name: str = "vit_tiny_patch16_224", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Return a small transformer with weights of one size, and images."""
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14} if "eva02" in name else {"img_size": 16, "patch_size": 8}
    model = timm.create_model(name, num_classes=5, embed_dim=24, depth=2, num_heads=2, **size)
    return randomise_(model).to(dtype).eval(), torch.randn(4, 3, size["img_size"], size["img_size"], dtype=dtype)


def all_but(model: nn.Module, ending: str | tuple[str, ...]) -> list[nn.Module]:
    """Return the Linear and convolution layers whose name does not end so, to be ignored."""
    kinds = (nn.Linear, nn.Conv2d)
    return [layer for name, layer in model.named_modules() if isinstance(layer, kinds) and not name.endswith(ending)]


class Clamped:
    """A copy of a dense model, with the channels a pruner removes clamped where they are consumed."""

    def __init__(self, model: nn.Module, pruner: VBPPruner, importance: VarianceImportance) -> None:
        self.model = copy.deepcopy(model)
        self._names = {layer: name for name, layer in model.named_modules()}
        self._means = {self._names[layer]: mean.clone() for layer, mean in importance.means.inputs.items()}
        self.removed: dict[str, list[int]] = {}
        plan = pruner.plan_removals

        def recorded(compensated: bool) -> Any:
            removals = plan(compensated)
            for removal in removals:
                for edge in read_group(pruner.group_of(removal)).consumers:
                    self.removed.setdefault(self._names[edge.layer], []).extend(edge.channels.tolist())
            return removals

        pruner.plan_removals = recorded  # type: ignore[method-assign]

    def __call__(self, images: Tensor) -> Any:
        """Run the copy with the clamps."""
        handles = []
        for name, channels in self.removed.items():
            layer, mean = self.model.get_submodule(name), self._means[name]

            def clamp(module: nn.Module, args: tuple[Tensor], channels=channels, mean=mean) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
                values = args[0].clone()
                if isinstance(module, nn.Linear):
                    values[..., channels] = mean[channels]
                else:
                    values[:, channels] = mean[channels, None, None]
                return (values,)

            handles.append(layer.register_forward_pre_hook(clamp))
        with torch.no_grad():
            output = self.model(images)
        for handle in handles:
            handle.remove()
        return output


def prepared(model: nn.Module, images: Tensor, **arguments: Any) -> tuple[VBPPruner, VarianceImportance, Clamped]:
    """Return a pruner over collected statistics, and the oracle of what it will do in one step."""
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    defaults: dict[str, Any] = {"global_pruning": True, "pruning_ratio": 0.3, "mean_dict": importance.means}
    pruner = VBPPruner(model, images[:1], importance, **{**defaults, **arguments})
    return pruner, importance, Clamped(model, pruner, importance)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare to 1e-10 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=float(expected.abs().max()) * 1e-10)
