"""The multiples in which channels suit a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vbp.sites.site import Site

# Measured on AVX-512: multiples of 8 cost nothing against larger ones, odd widths 9 to 21 % of an MLP
# (docs/export.md).
_CPU = 8


# Tensor cores work best on multiples of 128 bytes: 64 channels in half precision, 32 in TF32 (of float32).
# Source: NVIDIA, Matrix Multiplication Background User's Guide, "Requirements to use Tensor Cores".
_LINE_BYTES = 128


# A site that can choose among fewer widths than this is pruned too coarsely.
_CHOICES = 8


def recommended_round_to(device: torch.device, dtype: torch.dtype = torch.float32, sites: Sequence[Site] = ()) -> int:
    """Return the `round_to` that suits a device: a power of two.

    8 on a CPU; on a GPU as many channels as fill a line of memory, 64 in bfloat16 or float16 and 32 in float32; less
    where the narrowest site (in attention: its head) would have fewer than 8 widths to choose from.

    Args:
        device: Where the pruned model will run.
        dtype: In which it will compute: that of autocast, if there is one.
        sites: What will be pruned.
    """
    suited = _LINE_BYTES // max(2, dtype.itemsize) if device.type == "cuda" else _CPU
    narrowest = min((site.hidden // site.heads for site in sites), default=suited * _CHOICES)
    while suited > 1 and suited * _CHOICES > narrowest:
        suited //= 2
    return suited
