"""Save and restore the states of all random generators of a process, as plain data for a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch on the CPU and on the device, of Python and of NumPy."""
    generator = np.random.get_state(legacy=False)
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        # As a tensor: torch.load(weights_only=True) takes no NumPy array.
        "numpy": generator
        | {
            "state": {
                "key": torch.from_numpy(generator["state"]["key"].astype(np.int64)),
                "pos": generator["state"]["pos"],
            }
        },
    }


def set_random_state_(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state(
        state["numpy"] | {"state": {"key": inner["key"].cpu().numpy().astype(np.uint32), "pos": inner["pos"]}}
    )
