"""Name what users may choose, as literal types for flags, library and checks. Nothing here needs torch."""

from __future__ import annotations

from typing import Literal

ModelType = Literal["vit", "convnext", "swin", "auto"]

Criterion = Literal[
    "auto", "variance", "output_variance", "elimination", "random", "l1", "l2", "lamp", "taylor", "snip"
]  # fmt: skip

Scope = Literal["global", "per_layer", "equal"]
Compensation = Literal["none", "mean", "refit"]

# What the head of an attention loses: some of its channels, or of the directions in which they vary least.
Basis = Literal["channels", "principal"]

# Whether something is done: where it is possible, always (an error where it is not), or never.
Toggle = Literal["auto", "on", "off"]
# What becomes of the running statistics of BatchNorms after surgery.
BatchNormChoice = Literal["auto", "recalibrate", "match", "keep"]
Amp = Literal["auto", "off", "bf16", "fp16"]
MatmulPrecision = Literal["highest", "high"]
TableForm = Literal["table", "csv", "markdown"]

# What of a model's output is preserved, and by which an error is judged; `auto` goes by what the model returns.
ObjectiveKind = Literal["logits", "features", "zeroshot"]
ObjectiveChoice = Literal["auto", "logits", "features", "zeroshot"]
