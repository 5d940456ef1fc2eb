"""The smallest model of every image family of timm, torchvision and transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import vbp
from vbp.errors import first_line
from vbp.runtime.forward import logits_of

Library = Literal["timm", "torchvision", "transformers"]
CLASSES = 10

# A language model of billions of parameters, and a class that holds models of timm.
_NOT_OF_IMAGES = {"shieldgemma2", "timm_wrapper"}

# The only size of their family, of hundreds of millions of parameters in a stack of layers that are all alike.
_DEEP = {"deepseek_vit_412m"}

# Edges of images, in pixels, of which the first is taken that a model runs on; then its own.
_SIZES = (64, 96, 128, 160, 192, 224, 256)

# Parts of names by which small members of a family go, for families too large to build all of them.
_SMALL = "test atto femto pico nano xxs xxt tiny lite0 xs 050 mini small b0 18".split()
_CANDIDATES = 12


def members(library: str) -> dict[str, list[str]]:
    """Return the names of the models of each family."""
    if library == "timm":
        import timm

        found = {family: timm.list_models(module=family) for family in timm.list_modules()}
        return {family: names for family, names in found.items() if names}
    if library == "torchvision":
        import torchvision

        modules: dict[str, list[str]] = {}
        for name in torchvision.models.list_models(module=torchvision.models):
            family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
            modules.setdefault(family, []).append(name)
        return modules
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()
    found = {family: [names] if isinstance(names, str) else list(names) for family, names in classes}
    return {family: names for family, names in found.items() if family not in _NOT_OF_IMAGES}


def smallest(library: str, family: str) -> str:
    """Return the name of the smallest model of a family."""
    names = members(library)[family]
    if library == "timm":
        return _fewest_parameters(names)
    if library == "torchvision":
        import torchvision

        return min(names, key=lambda name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])
    return names[0]


def _fewest_parameters(names: list[str]) -> str:
    import timm

    def rank(name: str) -> tuple[int, int]:
        return next((place for place, part in enumerate(_SMALL) if part in name), len(_SMALL)), len(name)

    sizes = {}
    for name in sorted(names, key=rank)[:_CANDIDATES]:
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            continue  # needs real tensors
    return min(sizes, key=lambda name: sizes[name]) if sizes else min(names, key=rank)


def build(library: str, name: str, size: int | None = None) -> nn.Module:
    """Return the model with random weights, for images of this size where it must know."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        arguments: dict[str, Any] = {} if size is None else {"img_size": size}
        if name in _DEEP:
            arguments["depth"] = 2
        try:
            model: nn.Module = timm.create_model(name, num_classes=CLASSES, **arguments)
        except TypeError:
            model = timm.create_model(name, num_classes=CLASSES)
    elif library == "torchvision":
        import torchvision

        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    else:
        import transformers

        kind = getattr(transformers, name)
        model = kind(kind.config_class(num_labels=CLASSES, **_shallow(kind.config_class())))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # No scale of 0 or 1e-6 hides a mistake.
            if parameter.ndim <= 1 and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def _shallow(config: Any) -> dict[str, Any]:
    """Return the settings that leave two of a stack of many layers, which are all alike."""
    if config.model_type in {"clip", "metaclip_2", "siglip", "siglip2"}:
        return {"vision_config": _shallow(config.vision_config)}
    if config.model_type == "perceiver":
        return {"num_blocks": 1, "num_self_attends_per_block": 2}
    depth = getattr(config, "num_hidden_layers", None)
    return {"num_hidden_layers": 2} if isinstance(depth, int) and 12 <= depth <= 24 else {}


def images(count: int, size: int) -> Tensor:
    """Return random images."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def runnable(library: str, name: str) -> tuple[int, Callable[[], nn.Module]]:
    """Return the smallest size of images that the model runs on, and how it is built for it.

    Raises:
        InputError: It runs on none.
    """
    own, reason = _own_size(library, name), ""
    for size in (*(size for size in _SIZES if size < own), own):
        for asked in (size, None) if library == "timm" else (None,):
            try:
                model = build(library, name, asked)
                with torch.no_grad():
                    logits_of(model(images(2, size)))
            except Exception as error:  # noqa: BLE001 (of any library, for any reason)
                reason = first_line(error)
                continue
            return size, lambda asked=asked: build(library, name, asked)
    raise vbp.InputError(f"it runs on no image: {reason}")


def _own_size(library: str, name: str) -> int:
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        assert config is not None
        return int(config.input_size[-1])
    if library == "torchvision":
        return 299 if "inception" in name else 224
    import transformers

    size = getattr(getattr(transformers, name).config_class(), "image_size", None)
    return size if isinstance(size, int) else 224
