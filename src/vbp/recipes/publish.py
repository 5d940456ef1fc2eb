"""The pruned model that a run leaves to ship: one folder with all that loading and publishing need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vbp.deploy.artifact import read_artifact, save_pruned
from vbp.deploy.artifact_files import ARTIFACT, check_target
from vbp.deploy.hub import check_login
from vbp.deploy.model_card import push_to_hub
from vbp.errors import InputError, OutputError
from vbp.recipes.config import RunConfig
from vbp.recipes.options import Role, fields_with
from vbp.report.run_report import BEST, RunReport
from vbp.runtime.decode import to_json

_ALWAYS: Final = frozenset({"model_name", "keep_ratio", "criterion", "compensation", "epochs_ft"})


def check_shipping(config: RunConfig) -> None:
    """Check before the work that its result may be written and published."""
    check_target(config.save_dir / ARTIFACT)
    if config.push_to_hub is not None:
        check_login(config.push_to_hub)


def write_artifact(save_dir: Path, report: RunReport) -> None:
    """Write the best model of a run as a folder, with what was measured and how it was made; whole or not at all."""
    best = read_artifact(save_dir / BEST)
    save_pruned(
        best.weights,
        save_dir / ARTIFACT,
        plans=best.plans,
        source=best.source,
        preprocessing=best.preprocessing,
        class_names=best.class_names,
        metrics=_metrics(report),
        settings=published_settings(report.config),
    )


def publish_artifact(config: RunConfig) -> str:
    """Upload the folder of a run that has ended, and return its address."""
    folder, repository = config.save_dir / ARTIFACT, config.push_to_hub
    assert repository is not None
    base_model = base_model_of(config)
    try:
        return push_to_hub(folder, repository, base_model=base_model)
    except (InputError, OutputError) as error:
        raise OutputError(
            f"the run has ended and all its results are in {config.save_dir}, but the upload failed: {error}. "
            f"To upload them later: vbp.push_to_hub({str(folder)!r}, {repository!r}, base_model={base_model!r})"
        ) from error


def base_model_of(config: RunConfig) -> str | None:
    """Return the hub id of the dense model, where its weights came from the hub."""
    name = config.model_name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    given = config.checkpoint is not None or config.convnext_checkpoint is not None or Path(name).exists()
    return name if name.count("/") == 1 and not given else None


def published_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that show how its model was made, as far as they are not the defaults.

    Paths of this machine are left out.
    """
    # What was asked for in the place of a ratio is there instead.
    other = any(value is not None for name, value in config.items() if name.startswith("target_"))
    private, changed = fields_with(RunConfig, Role.LOCAL, Role.SPEED, Role.LAUNCH), changed_settings(config)
    return {
        name: value
        for name, value in config.items()
        if name not in private
        and (name in _ALWAYS or name in changed)
        and not (name == "model_name" and Path(value).exists())
        and not (name == "keep_ratio" and other)
    }


def changed_settings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the settings of a run that are not the defaults of `vbp run`."""
    usual = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(RunConfig)
    }
    return tuple(name for name, value in config.items() if value != to_json(usual[name]))


def _metrics(report: RunReport) -> dict[str, Any]:
    """Return what was measured on this model, and on those that it came from."""
    plain = report.to_dict()
    models = {"dense" if name == "base" else name: plain[name] for name in report.models}
    calibration = report.images.get("calibration")
    return {**models["best"], "calibration_images": calibration, "keep_ratio": report.keep_ratio, **models}
