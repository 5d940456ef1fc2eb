"""What planning and surgery through the Torch-Pruning face cost on a model of full size.

    python benchmarks/torch_pruning_time.py --model_name vit_base_patch16_224

Prints one JSON line: seconds of tracing, of the pruning step (planning, trial on a copy, surgery, mean shift) and of
collecting the statistics, which depends on the images and is given beside them.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass

import timm
import torch
import torch_pruning as tp
import tyro
from torch import nn

import vbp


@dataclass(frozen=True)
class Options:
    """Time VBPPruner on the MLPs of a timm model."""

    model_name: str = "vit_base_patch16_224"
    """A timm model whose MLP layers are called mlp.fc1; random weights cost as much as trained ones."""
    pruning_ratio: float = 0.35
    """Share of the hidden channels to remove."""


def main(options: Options) -> None:
    """Trace, collect, prune, and print the seconds of each."""
    model = timm.create_model(options.model_name).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]  # type: ignore[attr-defined, no-untyped-call]
    example, images = torch.randn(1, *size), torch.randn(4, *size)
    ignored = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith("mlp.fc1")
    ]
    seconds = {}
    importance = tp.importance.VarianceImportance()
    start = time.perf_counter()
    importance.collect_statistics(model, [images], torch.device("cpu"), ignored_layers=ignored)
    seconds["statistics"] = time.perf_counter() - start
    start = time.perf_counter()
    pruner = tp.pruner.VBPPruner(
        model,
        example,
        importance=importance,
        pruning_ratio=options.pruning_ratio,
        global_pruning=True,
        mean_dict=importance.means,
        ignored_layers=ignored,
    )
    seconds["tracing"] = time.perf_counter() - start
    start = time.perf_counter()
    pruner.step()
    seconds["step"] = time.perf_counter() - start
    result = {
        "model": options.model_name,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "planning_and_surgery": round(seconds["tracing"] + seconds["step"], 2),
        "params": vbp.count_parameters(model),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
