"""The folder that a run leaves goes to the hub; what would hinder that is found before the work, or loses nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hub_stand_in import Hub

from vbp import InputError, RunConfig, load_pruned, run
from vbp.cli.inspect import run_inspect
from vbp.cli.main import guarded
from vbp.cli.options import InspectConfig
from vbp.deploy.hub import check_login
from vbp.recipes.config import DemoConfig
from vbp.recipes.demo import demo_run_config
from vbp.recipes.publish import base_model_of, changed_settings, publish_artifact, published_settings


@pytest.fixture
def config(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a run of a few images that is to be published, without drawing."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("vbp.report.html.write_report", lambda folder: folder / "report.html")
    return dataclasses.replace(
        demo_run_config(DemoConfig(epochs_ft=0)), data_path=str(digits), calib_samples=40, limit_val=40,
        compare_uncompensated=False, save_dir=tmp_path / "a run", overwrite=False, push_to_hub="me/digits",
    )  # fmt: skip


def test_a_run_publishes_its_folder_with_a_card_of_what_was_measured(
    hub: Hub, config: RunConfig, digits: Path
) -> None:
    report = run(config)
    (files,) = hub.repositories["me/digits"]
    assert sorted(files) == ["README.md", "model.safetensors", "vbp.json"]
    folder, images = Path(report.files["artifact"]), torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pruned("hf://me/digits")(images), load_pruned(folder)(images))
    card = files["README.md"].decode()
    assert f"| top1 | {report.best.top1_text} |" in card
    assert f"| dense | {report.base.top1_text} |" in card
    assert "| `keep_ratio` | 0.5 |" in card
    assert 'vbp.load_pruned("hf://me/digits")' in card
    for path in (digits, config.save_dir.parent):
        assert all(str(path).encode() not in content for content in files.values())
    # The folder is a model like any other for the commands.
    assert run_inspect(InspectConfig(str(folder))).to_dict()["sites"]


def test_a_failed_upload_loses_nothing_and_says_how_to_try_again(
    hub: Hub, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.closed = True
    assert guarded(lambda: [run(config)].clear()) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the run has ended and all its results are in")
    assert {"summary.json", "artifact", "vbp_best.pth"} <= {file.name for file in config.save_dir.iterdir()}
    assert hub.repositories == {}
    hub.closed = False
    exec(compile("import vbp; " + error.split("To upload them later: ")[1], "command", "exec"), {})
    assert len(hub.repositories["me/digits"]) == 1
    load_pruned("hf://me/digits")


@pytest.mark.parametrize(
    ("token", "repository", "message"),
    [
        ("", "me/digits", "nobody is logged in who could write to me/digits; run `hf auth login`"),
        ("hf_stranger", "me/digits", "the hub does not know the token that is to write to me/digits"),
        ("hf_reader", "me/digits", "the token of me can read alone, and me/digits is to be written"),
        ("hf_writer", "them/digits", "me is logged in and may write to me, team, got them/digits"),
        (None, "me/digits", "the hub cannot be reached, so me/digits could not be written"),
    ],
)
def test_what_would_hinder_the_upload_is_found_before_the_work(
    hub: Hub, config: RunConfig, monkeypatch: pytest.MonkeyPatch, token: str | None, repository: str, message: str
) -> None:
    if token is None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
        # No token of whoever runs the tests.
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(config.save_dir / "token"))
        monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_google_colab", lambda: None)
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(config, push_to_hub=repository))
    assert not config.save_dir.exists()
    assert not [path for path in hub.requests if "whoami" not in path]


def test_organisations_and_tokens_with_fine_grains_pass(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_login("team/digits")
    check_login("Me/digits")
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    check_login("them/digits")
    assert hub.repositories == {}


def test_what_is_told_of_the_settings(tmp_path: Path) -> None:
    config = RunConfig(
        "/home/me/data", model_name="deit_tiny_patch16_224", checkpoint=Path("/home/me/w.pth"), mixup=0.2,
        save_dir=tmp_path, num_workers=8, crop_pct=0.9, push_to_hub="me/vit", resume="/home/me/run",
    )  # fmt: skip
    assert published_settings(config.to_dict()) == {
        "model_name": "deit_tiny_patch16_224", "keep_ratio": 0.65, "criterion": "auto",
        "compensation": "refit", "epochs_ft": 10, "mixup": 0.2,
    }  # fmt: skip
    local = dataclasses.replace(config, model_name=str(tmp_path))
    assert "model_name" not in published_settings(local.to_dict())
    faster = published_settings(RunConfig("data", target_speedup=1.2).to_dict())
    assert "keep_ratio" not in faster
    assert faster["target_speedup"] == 1.2


@pytest.mark.parametrize(
    ("changed", "base"),
    [
        ({"model_name": "google/vit"}, "google/vit"),
        ({"model_name": "hf-hub:timm/vit"}, "timm/vit"),
        ({"model_name": "deit_tiny_patch16_224"}, None),
        ({"model_name": "timm/vit", "checkpoint": Path("other.pth")}, None),
    ],
)
def test_the_base_model_is_named_where_its_weights_came_from_the_hub(
    changed: dict[str, object], base: str | None
) -> None:
    assert base_model_of(RunConfig("data", **changed)) == base  # type: ignore[arg-type]


def test_what_tries_again_names_the_base_model(config: RunConfig) -> None:
    with pytest.raises(OSError, match=r"takes the folder of a pruned model") as caught:
        publish_artifact(dataclasses.replace(config, model_name="google/vit", checkpoint=None))
    assert str(caught.value).split("later: ")[1] == (
        f"vbp.push_to_hub('{config.save_dir / 'artifact'}', 'me/digits', base_model='google/vit')"
    )


def test_changed_settings_are_those_that_are_not_as_by_default() -> None:
    assert changed_settings(RunConfig("data").to_dict()) == ("data_path",)
    changed = RunConfig("data", mean=(0.5, 0.5, 0.5), model_kwargs={"depth": 4}, crop_scale=(0.08, 1.0), use_kd=True)
    assert {*changed_settings(changed.to_dict())} == {"data_path", "mean", "model_kwargs", "use_kd"}
