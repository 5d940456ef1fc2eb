"""The configuration: published names and defaults, repeatable from its JSON, and contradictions refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vbp import InputError, RunConfig, run
from vbp.recipes.checks import check_config
from vbp.recipes.options import REFITS, Role, fields_with, roles_of
from vbp.runtime.choices import Criterion, Toggle
from vbp.sweeps.config import SweepConfig

PUBLISHED: dict[str, Any] = {
    "model_type": "vit",
    "model_name": "google/vit-base-patch16-224",
    "convnext_checkpoint": None,
    "bottleneck": False,
    "train_batch_size": 64,
    "val_batch_size": 128,
    "num_workers": 4,
    "processes": 1,
    "keep_ratio": 0.65,
    "global_pruning": False,
    "norm_per_layer": False,
    "epochs_ft": 10,
    "lr_ft": 1.5e-5,
    "use_kd": False,
    "kd_alpha": 0.7,
    "kd_beta": 0.3,
    "kd_T": 2.0,
    "disable_ddp": False,
    "save_dir": Path("./output/vbp"),
    "checkpoint": None,
    "calib_samples": 0,
    "compensation": "refit",
    "criterion": "auto",
    "target_macs": None,
    "target_params": None,
    "target_latency_ms": None,
    "target_speedup": None,
    "ridge": 0.01,
    "refit_kernels": "auto",
    "refit_producers": "auto",
    "refit_stream": "auto",
    "refit_head": "auto",
    "refit_views": "auto",
    "round_to": 1,
    "min_keep_ratio": 0.02,
    "seed": 0,
    "device": "auto",
    "limit_val": 0,
    "stats_path": None,
    "overwrite": False,
    "allow_random_init": False,
    "allow_bad_dense": False,
    "img_size": None,
    "crop_pct": None,
    "interpolation": None,
    "mean": None,
    "std": None,
    "weight_decay": 0.01,
    "label_smoothing": 0.0,
    "auto_augment": None,
    "reprob": 0.0,
    "drop_path": 0.0,
    "layer_decay": 1.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema": False,
    "warmup_epochs": 0.0,
    "clip_grad": None,
    "resume": None,
    "amp": "auto",
    "compile": False,
}
"""Names and defaults that users and older commands rely on."""

DATA = "data"


def test_the_defaults_are_the_published_ones() -> None:
    config = RunConfig(DATA)
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED
    check_config(config)


def test_the_data_path_has_no_default() -> None:
    with pytest.raises(TypeError, match="data_path"):
        RunConfig()  # type: ignore[call-arg]


def test_nothing_changes_a_configuration() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig(DATA).seed = 1  # type: ignore[misc]


names = st.text("aZ/._- '\"\\ü界", min_size=1, max_size=8)
paths = names.map(Path)
colours = st.lists(st.floats(0, 1), min_size=1, max_size=3).map(tuple)
configs = st.builds(
    RunConfig,
    data_path=names,
    target_macs=st.none() | names,
    round_to=st.integers(1, 64) | st.just("auto"),
    model_name=names,
    checkpoint=st.none() | paths,
    convnext_checkpoint=st.none() | paths,
    stats_path=st.none() | paths,
    save_dir=paths,
    img_size=st.none() | st.integers(1, 512),
    interpolation=st.none() | names,
    mean=st.none() | colours,
    std=st.none() | colours,
    keep_ratio=st.floats(0.01, 1),
    lr_ft=st.floats(1e-9, 1e-2),
    use_kd=st.booleans(),
    seed=st.integers(0, 2**32),
    local_rank=st.none() | st.integers(0, 7),
    model_kwargs=st.dictionaries(names, st.integers() | st.booleans() | names, max_size=2),
    hflip=st.booleans(),
    crop_scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)


@given(configs)
@settings(deadline=None, max_examples=20)
def test_json_gives_the_same_configuration_back(config: RunConfig) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = RunConfig.from_dict(json.loads(text))
    assert again == config
    assert json.dumps(again.to_dict()) == text


def test_the_json_names_every_field() -> None:
    assert list(RunConfig(DATA).to_dict()) == [field.name for field in dataclasses.fields(RunConfig)]


def test_sequences_among_the_models_arguments_come_back_too() -> None:
    config = RunConfig(DATA, model_kwargs={"depths": [1, 2], "head": {"layers": [3]}})
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_two_configurations_share_no_arguments() -> None:
    first, second = RunConfig(DATA), RunConfig(DATA)
    first.model_kwargs["depth"] = 4
    assert second.model_kwargs == {}
    first.to_dict()["model_kwargs"].clear()
    assert first.model_kwargs == {"depth": 4}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "must hold data_path"),
        ({"model_name": "deit"}, "must hold data_path"),
        ({"data_path": "data", "keep_rate": 0.5, "abc": 1}, r"unknown \['abc', 'keep_rate'\]"),
    ],
)
def test_a_configuration_of_another_version_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunConfig.from_dict(value)


def test_what_a_configuration_leaves_out_takes_its_default() -> None:
    assert RunConfig.from_dict({"data_path": "data", "seed": 3}) == RunConfig(DATA, seed=3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attn_keep_ratio": 0.8}, "attn_keep_ratio changes nothing unless attention is pruned"),
    (
        {"equal_widths": True, "global_pruning": True, "criterion": "variance"},
        "equal_widths .* and global_pruning .* leave one of them out",
    ),
    ({"train_batch_size": 0}, "train_batch_size must be at least 1, got 0"),
    ({"val_batch_size": -1}, "val_batch_size must be at least 1, got -1"),
    ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ({"calib_samples": -1}, "calib_samples must be at least 0, got -1"),
    ({"limit_val": -1}, "limit_val must be at least 0, got -1"),
    ({"epochs_ft": -1}, "epochs_ft must be at least 0, got -1"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"lr_ft": 0.0}, r"lr_ft must be in \(0, 1\), got 0.0"),
    ({"lr_ft": 1.5}, r"lr_ft must be in \(0, 1\), got 1.5"),
    ({"lr_ft": math.nan}, r"lr_ft must be in \(0, 1\), got nan"),
    ({"norm_per_layer": True, "criterion": "variance"}, "norm_per_layer changes nothing .* add --global_pruning"),
    ({"norm_per_layer": True, "global_pruning": True, "criterion": "l2"}, "norm_per_layer divides variances, got"),
    ({"compensation": "mean"}, "criterion auto chooses for the refit, got compensation mean"),
    (
        {"criterion": "variance", "compensation": "mean", "ridge": 0.1},
        r"ridge changes nothing without covariances, got 0\.1",
    ),
    (
        {"criterion": "l2", "compensation": "none", "covariance_tokens": 0.5},
        "covariance_tokens changes nothing without covariances",
    ),
    (
        {"criterion": "variance", "compensation": "mean", "refit_producers": "off"},
        "refit_producers changes nothing without the refit, got off with compensation mean",
    ),
    (
        {"criterion": "variance", "compensation": "mean", "refit_stream": "on"},
        "refit_stream changes nothing without the refit, got on with compensation mean",
    ),
    (
        {"criterion": "variance", "compensation": "mean", "refit_head": "on"},
        "refit_head changes nothing without the refit, got on with compensation mean",
    ),
    (
        {"criterion": "variance", "compensation": "mean", "refit_views": 2},
        "refit_views changes nothing without the refit, got 2 with compensation mean",
    ),
    (
        {"refit_views": 2, **dict.fromkeys(REFITS, "off")},
        "refit_views changes nothing where nothing is refitted after surgery, got 2",
    ),
    ({"calib_views": 0}, "calib_views must be at least 1, got 0"),
    (
        {"calib_views": 2, "stats_path": Path("s.safetensors")},
        r"calib_views changes nothing where statistics come from a file, got 2 with stats_path s\.safetensors",
    ),
    ({"refit_views": 0}, "refit_views must be at least 1 or auto, got 0"),
    ({"criterion": "magnitude"}, "criterion must be one of .*, got 'magnitude'"),
    ({"covariance_tokens": 0.0}, r"share of tokens must be in \(0, 1\], got 0.0"),
    ({"ridge": 0.0}, r"ridge must be in \(0, 1\], got 0.0"),
    ({"keep_ratio": 0.5, "target_macs": "0.8"}, "one budget, .* got keep_ratio and target_macs"),
    ({"target_macs": "0.8", "target_speedup": 1.2}, "one budget, .* got target_macs and target_speedup"),
    ({"target_macs": "1.1 X"}, "target_macs must be a number above 0, got '1.1 X'"),
    ({"target_params": "1.5"}, "target_params must be a share in .* or a count, got 1.5"),
    ({"target_speedup": 0.9}, "target_speedup must be above 1, got 0.9"),
    ({"best_effort": True}, "best_effort changes nothing without a target"),
    ({"cost_aware": "off"}, "cost_aware changes nothing without a target"),
    ({"attention": "off"}, "attention changes nothing without a target"),
    (
        {"attention": "on", "target_macs": "0.8", "criterion": "elimination", "global_pruning": True},
        "attention changes nothing without the criterion auto, got on; choose it",
    ),
    (
        {"attention": "on", "target_macs": "0.8", "attn_keep_ratio": 0.5, "bottleneck": True},
        "attention on lets attention share the budget by what each direction costs and saves, got it with attn_keep",
    ),
    (
        {"attention": "on", "target_macs": "0.8", "cost_aware": "off"},
        "attention on lets attention share the budget .*, got it with cost_aware off; leave one of them out",
    ),
    (
        {"attention": "off", "target_macs": "0.8", "bottleneck": True},
        "attention off keeps attention whole and bottleneck prunes it, got both; leave one of them out",
    ),
    ({"text_embeddings": Path("a.npy")}, "text_embeddings changes nothing without the objective zeroshot, got a.npy"),
    ({"objective": "zeroshot"}, "zeroshot needs text embeddings, got none; give --text_embeddings FILE"),
    (
        {"cost_aware": "on", "target_macs": "0.8", "criterion": "variance", "compensation": "mean"},
        "cost_aware changes nothing unless layers are ranked together, got on; add --global_pruning",
    ),
    ({"tune": "5min"}, "tune must be auto, off, a number of epochs above 0 as 8, or a time .*, got '5min'"),
    ({"tune": 0}, "tune must be auto, off, .*, got '0'"),
    ({"epochs_ft": 0, "tune": 8, "lr_ft": 1e-4, "grad_accum": 2}, "lr_ft change nothing without fine-tuning"),
    ({"tune": 8, "kd_T": 4.0}, "kd_T change nothing without distillation"),
    ({"target_latency_ms": 0.0}, "target_latency_ms must be a number above 0, got 0.0"),
    ({"latency_batch": 0}, "latency_batch must be at least 1, got 0"),
    ({"grad_accum": 0}, "grad_accum must be at least 1, got 0"),
    ({"processes": 0}, "processes must be at least 1, got 0"),
    ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
    ({"max_pixels": 0}, "max_pixels must be at least 1, got 0; 178956970 is usual"),
    ({"prefetch": 4, "num_workers": 0}, "prefetch changes nothing without num_workers"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ({"mixup": math.inf}, "mixup must be at least 0, got inf"),
    ({"cutmix": -1.0}, "cutmix must be at least 0, got -1.0"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ({"ema": True, "ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
    ({"ema_decay": 0.5}, "ema_decay change nothing without a moving average"),
    ({"auto_augment": "rand-x"}, "auto_augment must be a policy of timm, .* got 'rand-x'"),
    ({"reprob": 1.5}, r"reprob must be a probability in \[0, 1\], got 1.5"),
    ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
    ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
    ({"epochs_ft": 0, "layer_decay": 0.75}, "layer_decay change nothing without fine-tuning"),
    ({"clip_grad": 0.0}, "clip_grad must be above 0, got 0.0"),
    ({"timeout_minutes": 0.0}, "timeout_minutes must be above 0, got 0.0"),
    ({"checkpoint_minutes": -1.0}, "checkpoint_minutes must be at least 0, got -1.0"),
    ({"warmup_epochs": 10.0}, "warmup_epochs must be below epochs_ft, got 10.0 and 10"),
    ({"resume": "auto", "overwrite": True}, "resume keeps what is in save_dir and overwrite replaces it"),
    ({"kd_alpha": 0.5}, "kd_alpha change nothing without distillation"),
    (
        {"epochs_ft": 0, "use_kd": True, "kd_T": 4.0},
        "use_kd, kd_T change nothing without fine-tuning, .* epochs_ft 0",
    ),
    ({"epochs_ft": 0, "train_batch_size": 8, "lr_ft": 1e-4}, "train_batch_size, lr_ft change nothing without fine-t"),
    ({"push_to_hub": "vit"}, "a repository of the hub must be OWNER/NAME, got 'vit': it has no owner"),
    ({"push_to_hub": "me/vit small"}, "must be OWNER/NAME, got 'me/vit small': .*alphanumeric"),
    ({"push_to_hub": "me/a/b"}, "must be OWNER/NAME, got 'me/a/b'"),
    ({"epochs_ft": 0, "log_dir": Path("logs")}, "log_dir change nothing without fine-tuning"),
    ({"kd_beta": 0.5, "kd_T": 4.0}, "kd_beta, kd_T change nothing without distillation"),
    (
        {"checkpoint": Path("a"), "convnext_checkpoint": Path("b")},
        "checkpoint and convnext_checkpoint were both given",
    ),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_bad_values_and_flags_without_effect_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_config(RunConfig(DATA, **changed))


@pytest.mark.parametrize(
    ("criterion", "cost_aware", "divided"),
    [
        ("auto", "auto", True),
        ("auto", "off", False),
        ("elimination", "auto", False),  # not in nats: the small Swin loses by it
        ("variance", "auto", False),
        ("variance", "on", True),
    ],
)
def test_costs_in_nats_are_divided_by_savings_and_others_when_asked(
    criterion: Criterion, cost_aware: Toggle, divided: bool
) -> None:
    config = RunConfig("data", criterion=criterion, cost_aware=cost_aware, target_macs="0.7", global_pruning=True)
    assert config.ranks_by_cost is divided
    assert not dataclasses.replace(config, target_macs=None).ranks_by_cost


@pytest.mark.parametrize(
    "changed",
    [
        {"norm_per_layer": True, "global_pruning": True, "criterion": "variance"},
        {"criterion": "variance", "compensation": "mean"},
        {"criterion": "elimination", "compensation": "mean", "ridge": 0.1},
        {"criterion": "l2", "compensation": "none"},
        {"target_macs": "0.8", "round_to": "auto"},
        {"use_kd": True, "kd_alpha": 0.5, "kd_beta": 0.5, "kd_T": 4.0},
        {"num_workers": 0, "epochs_ft": 0},
        {"epochs_ft": 0, "tune": "5m", "train_batch_size": 16, "grad_accum": 2, "teacher": "source", "compile": True},
        {"calib_samples": "auto", "ema": True, "ema_decay": 0.99, "warmup_epochs": 0.5, "clip_grad": 1.0},
        {"checkpoint": Path("a")},
    ],
)
def test_flags_that_work_together_pass(changed: dict[str, Any]) -> None:
    check_config(RunConfig(DATA, **changed))


# The lists of names that the roles stand in place of.
TUNING = (
    "train_batch_size lr_ft use_kd kd_alpha kd_beta kd_T teacher grad_accum weight_decay warmup_epochs clip_grad "
    "label_smoothing auto_augment reprob drop_path layer_decay mixup cutmix ema ema_decay compile "
    "grad_checkpointing checkpoint_minutes log_dir"
)
FREE = (
    "num_workers prefetch resume overwrite disable_ddp local_rank checkpoint_minutes timeout_minutes save_dir "
    "log_dir push_to_hub stats_path best_effort allow_bad_dense processes"
)
PRIVATE = (
    "data_path checkpoint convnext_checkpoint stats_path save_dir log_dir num_workers prefetch resume overwrite "
    "disable_ddp local_rank device checkpoint_minutes timeout_minutes push_to_hub compare_uncompensated model_kwargs "
    "img_size crop_pct interpolation mean std best_effort allow_bad_dense teacher processes text_embeddings"
)
INCIDENTAL = "save_dir overwrite resume log_dir local_rank push_to_hub best_effort allow_bad_dense processes"
DECIDING_A_SWEEP = (
    "round_to min_keep_ratio bottleneck convolutions include exclude seed limit_val max_pixels val_batch_size "
    "matmul_precision "
    "latency calib_views covariance_tokens ridge batchnorm refit_kernels refit_producers refit_stream refit_head "
    "refit_views "
    "epochs_ft hflip crop_scale train_batch_size lr_ft use_kd kd_alpha kd_beta kd_T grad_accum weight_decay "
    "warmup_epochs clip_grad label_smoothing mixup cutmix ema ema_decay compile grad_checkpointing "
    "auto_augment reprob drop_path layer_decay"
)


@pytest.mark.parametrize(
    ("kind", "roles", "names"),
    [
        (RunConfig, [Role.TUNING], TUNING),
        (RunConfig, [Role.SPEED, Role.LAUNCH], FREE),
        (RunConfig, [Role.LOCAL, Role.SPEED, Role.LAUNCH], PRIVATE),
        (RunConfig, [Role.LAUNCH], INCIDENTAL),
        (SweepConfig, [Role.RESULT], DECIDING_A_SWEEP),
    ],
)
def test_a_role_names_its_settings(kind: type, roles: list[Role], names: str) -> None:
    assert sorted(fields_with(kind, *roles)) == sorted(names.split())


@pytest.mark.parametrize("kind", [RunConfig, SweepConfig])
def test_every_setting_has_a_role(kind: type) -> None:
    """A new one does not go unnoticed where a run goes on, is compared or published."""
    assert [name for name, roles in roles_of(kind).items() if len(roles - {Role.TUNING}) != 1] == []


def test_a_flag_that_run_and_sweep_share_has_the_same_role_in_both() -> None:
    of_runs = roles_of(RunConfig)
    assert [name for name, roles in roles_of(SweepConfig).items() if of_runs.get(name, roles) != roles] == []


MORE_REFUSED: list[tuple[dict[str, Any], str]] = [
    *REFUSED,
    ({"keep_ratio": 0.0}, "keep_ratio must be in"),
    ({"keep_ratio": 1.3}, "keep_ratio must be in"),
    ({"min_keep_ratio": 0.7}, "min_keep_ratio must not exceed keep_ratio"),
    ({"round_to": 0}, "round_to must be at least 1"),
    ({"use_kd": True, "kd_T": 0.0}, "kd_T must be above 0"),
    ({"use_kd": True, "kd_alpha": -1.0}, "kd_alpha and kd_beta must be at least 0"),
    ({"device": "abacus"}, "device must be auto, cpu, cuda or cuda:N"),
    ({"device": "cuda:99"}, "device must be auto, cpu, cuda or cuda:N and present"),
    ({}, "data_path must hold train/<class>/ and val/<class>/, got no folder"),
]


@pytest.mark.parametrize(("changed", "message"), MORE_REFUSED)
def test_a_run_refuses_them_before_it_reads_or_writes_anything(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=message):
        run(RunConfig(str(tmp_path / "data"), save_dir=tmp_path / "out", **changed))
    assert list(tmp_path.iterdir()) == []


def test_a_launch_without_a_rank_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="RANK must be a whole number, got None; start with torchrun"):
        run(RunConfig(str(tmp_path / "data"), save_dir=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
