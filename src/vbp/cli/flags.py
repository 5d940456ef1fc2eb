"""The groups in which the help of a command shows its flags, and what each of them expects; nothing needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ARGUMENTS: Final[Mapping[str, str]] = {
    "artifact": "ARTIFACT", "model": "MODEL", "images": "IMAGE...", "runs": "RUN RUN...",
}  # fmt: skip
"""Words without a flag: the name of the setting, and what is shown in its place."""

GROUPS: Final[Mapping[str, Mapping[str, str]]] = {
    "model": {
        "model_name": "MODEL", "model_type": "", "checkpoint": "FILE", "convnext_checkpoint": "FILE",
        "model_kwargs": "JSON", "allow_random_init": "", "allow_bad_dense": "", "dense": "auto|MODEL",
    },
    "data": {
        "data_path": "FOLDER", "calib_samples": "N", "images": "N", "limit_val": "N", "batch_size": "N",
        "val_batch_size": "N", "max_pixels": "N", "seed": "N", "img_size": "PIXELS", "crop_pct": "SHARE",
        "interpolation": "NAME", "mean": "NUMBER...", "std": "NUMBER...",
    },
    "pruning": {
        "criterion": "CRITERION", "criteria": "CRITERION...", "compensation": "",
        "compensations": "COMPENSATION...", "global_pruning": "", "scopes": "SCOPE...", "norm_per_layer": "",
        "equal_widths": "", "cost_aware": "", "round_to": "N", "min_keep_ratio": "SHARE", "attention": "",
        "bottleneck": "", "attn_keep_ratio": "SHARE", "convolutions": "", "include": "PATTERN...",
        "exclude": "PATTERN...", "objective": "", "text_embeddings": "FILE",
    },
    "budget": {
        "keep_ratio": "SHARE", "keep_ratios": "SHARE...", "target_macs": "COUNT|SHARE",
        "target_params": "COUNT|SHARE", "target_latency_ms": "MS", "target_speedup": "FACTOR", "best_effort": "",
        "latency_batch": "N",
    },
    "refit": {
        "calib_views": "N", "covariance_tokens": "SHARE", "ridge": "SHARE", "batchnorm": "",
        "refit_kernels": "", "refit_producers": "", "refit_stream": "", "refit_head": "", "refit_views": "N",
    },
    "fine-tuning": {
        "tune": "off|auto|EPOCHS|TIME",
        "epochs_ft": "N", "train_batch_size": "N", "grad_accum": "N", "lr_ft": "RATE", "layer_decay": "FACTOR",
        "warmup_epochs": "EPOCHS", "weight_decay": "RATE", "clip_grad": "NORM", "use_kd": "", "kd_alpha": "WEIGHT",
        "kd_beta": "WEIGHT", "kd_T": "TEMPERATURE", "teacher": "source|MODEL", "label_smoothing": "SHARE",
        "hflip": "", "crop_scale": "LEAST LARGEST", "auto_augment": "POLICY", "reprob": "PROBABILITY",
        "drop_path": "RATE", "mixup": "ALPHA", "cutmix": "ALPHA", "ema": "", "ema_decay": "FACTOR",
    },
    "timing": {
        "batch_sizes": "N...", "backend": "", "threads": "N", "precision": "", "channels_last": "", "rounds": "N",
        "warmup": "N", "budget_s": "SECONDS",
    },
    "export": {
        "to": "", "dtype": "", "opset": "N", "reduce_range": "", "tolerance": "SHARE",
    },
    "speed": {
        "device": "DEVICE", "amp": "", "matmul_precision": "", "num_workers": "N", "prefetch": "N",
        "stats_path": "FILE", "compile": "", "grad_checkpointing": "",
    },
    "long runs": {
        "point": "K/N", "seeds": "N",
        "resume": "auto|PATH", "checkpoint_minutes": "MINUTES", "processes": "N", "disable_ddp": "",
        "timeout_minutes": "MINUTES", "local_rank": "N",
    },
    "output": {
        "save_dir": "FOLDER", "folder": "FOLDER", "output": "FILE", "overwrite": "", "log_dir": "FOLDER",
        "push_to_hub": "OWNER/NAME", "compare_uncompensated": "", "latency": "", "top": "N", "form": "", "json": "",
    },
}  # fmt: skip
"""Group -> flags in the order of the help -> what a flag expects; switches, and flags with a choice, say it
themselves. A flag of one name stands in the same group in every command."""
