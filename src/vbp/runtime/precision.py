"""Choose how numbers are stored and multiplied: autocast, loss scaling, TF32, and the layout of images in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from vbp.errors import InputError
from vbp.runtime.choices import Amp, MatmulPrecision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The type of matrix products and convolutions in a forward pass; None leaves all as it is.

    Weights, statistics and losses stay as they are.
    """

    dtype: torch.dtype | None = None
    device_type: str = "cpu"

    @staticmethod
    def choose(amp: Amp, device: torch.device) -> Precision:
        """Return what a user asked for, or for `auto` bf16 where the GPU computes in it and nothing elsewhere."""
        if amp == "auto":
            amp = "bf16" if device.type == "cuda" and _has_bf16(device) else "off"
        if amp == "off":
            return Precision(None, device.type)
        if amp not in _DTYPES:
            raise InputError(f"amp must be auto, off, bf16 or fp16, got {amp!r}; leave --amp out for auto")
        if amp == "fp16" and device.type == "cpu":
            raise InputError("amp fp16 needs a GPU, got device cpu; give --amp bf16 or --amp off")
        if amp == "bf16" and device.type == "cuda" and not _has_bf16(device):
            name = torch.cuda.get_device_name(device)
            raise InputError(f"amp bf16 needs a GPU that computes in it, got {name}; give --amp fp16 or --amp off")
        return Precision(_DTYPES[amp], device.type)

    @staticmethod
    def for_tuning(amp: Amp, device: torch.device) -> Precision:
        """Choose as `choose` does, but for `auto` bf16 on a CPU too, where it multiplies in bf16."""
        if amp == "auto" and device.type == "cpu" and _cpu_has_bf16():
            amp = "bf16"
        return Precision.choose(amp, device)

    @property
    def name(self) -> str:
        """Return `off`, `bf16` or `fp16`."""
        return next((name for name, dtype in _DTYPES.items() if dtype == self.dtype), "off")

    def autocast(self) -> AbstractContextManager[None]:
        """Compute the forward passes within in this type."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def scaler(self) -> GradScaler:
        """Return a scaler of the loss: fp16 loses small gradients without one; for other types it does nothing."""
        return GradScaler(self.device_type, enabled=self.dtype == torch.float16)


def _has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        # Older GPUs emulate it, slower than float32.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_has_bf16() -> bool:
    # Others emulate it, slower than float32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def in_float32(logits: Tensor) -> Tensor:
    """Return logits in which a loss can be computed: those of an autocast pass hold eight or eleven bits."""
    return logits.float() if logits.dtype in _DTYPES.values() else logits


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """Choose how this process multiplies float32 matrices and convolves: `high` uses TF32 where there is any.

    Left alone, PyTorch convolves in TF32 and multiplies matrices without it.
    """
    if precision not in ("highest", "high"):
        raise InputError(f"matmul_precision must be highest or high, got {precision!r}; high uses TF32")
    # The newer `fp32_precision` of each backend leaves `get_float32_matmul_precision` and `allow_tf32`, which
    # torch.compile reads, raising an error about mixed settings (torch 2.15).
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"


def memory_format_for(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Choose the layout of weights and images: channels last for convolutional networks, on a CPU and on a GPU.

    A network counts as convolutional if the windows of a convolution overlap; those of a patch embedding do not.
    """
    overlapping = any(
        isinstance(module, nn.Conv2d)
        and any(size > step for size, step in zip(module.kernel_size, module.stride, strict=True))
        for module in model.modules()
    )
    return torch.channels_last if overlapping and device.type in ("cpu", "cuda") else torch.preserve_format


def move_(model: nn.Module, device: torch.device) -> nn.Module:
    """Bring a model to a device, in the layout that suits both.

    Images may come in any layout: a convolution gives its output that of its weight.
    """
    model.to(device)
    if memory_format_for(model, device) == torch.channels_last:
        # Module.to turns all weights of four dimensions, those of convolutions.
        model.to(memory_format=torch.channels_last)
    return model
