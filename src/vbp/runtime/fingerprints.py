"""Hash models, texts and data: what has the same fingerprint is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def model_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: names, shapes, types and values of parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()


def text_fingerprint(parts: Iterable[str]) -> str:
    """Return the SHA-256 of texts one after the other; those of file names may hold bytes that are no UTF-8."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode(errors="surrogateescape"))
    return digest.hexdigest()


def json_fingerprint(value: Any) -> str:
    """Return the SHA-256 of plain JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
