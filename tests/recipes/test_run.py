"""The whole job on the embedded digits: what a run leaves behind, and what it refuses before it begins."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pytest
import torch
from torch import nn

import vbp.recipes.finetune as tuning
import vbp.recipes.run
from vbp import (
    InputError,
    PruningPlan,
    RunConfig,
    RunReport,
    Statistics,
    count_parameters,
    evaluate,
    load_classifier,
    load_pruned,
    read_artifact,
)
from vbp.cli.main import guarded
from vbp.data.data_path import list_images
from vbp.data.digits import MODEL_KWARGS, MODEL_NAME, PREPROCESSING, WEIGHTS, write_digits
from vbp.data.loader import make_loader
from vbp.data.preprocessing import evaluation_transform
from vbp.recipes.measure import machine
from vbp.recipes.run import run
from vbp.recipes.setup import Job, prepare
from vbp.runtime.decode import to_json
from vbp.runtime.files import folder_lock
from vbp.runtime.processes import command_line
from vbp.runtime.session import Session
from vbp.training.checkpoints import latest_checkpoint, read_checkpoint


@pytest.fixture(scope="session")
def config(demo_config: RunConfig) -> RunConfig:
    """Return the demo's configuration, cut to one epoch."""
    return demo_config


@pytest.fixture(scope="session")
def report(config: RunConfig) -> RunReport:
    """Return the report of one whole run."""
    return run(config)


def test_a_run_leaves_every_file(config: RunConfig, report: RunReport) -> None:
    names = {
        "vbp_imagenet.log", "vbp_best.pth", "vbp_final.pth", "config.json", "plan.json", "statistics.safetensors",
        "metrics.jsonl", "summary.json", "checkpoints", "report.html", "report.md", "figures", "artifact",
    }  # fmt: skip
    assert {entry.name for entry in config.save_dir.iterdir()} == names
    summary = json.loads((config.save_dir / "summary.json").read_text())
    assert summary == json.loads(json.dumps(report.to_dict()))
    for model in ("base", "pruned", "best", "final"):
        assert {"top1", "top5", "macs", "params"} <= set(summary[model])
    assert summary["images"] == {"calibration": 901, "val": 896}
    assert set(summary["seconds"]) == {"calibration", "planning", "surgery", "finetune", "evaluation"}
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    assert summary["config"] == config.to_dict() == json.loads((config.save_dir / "config.json").read_text())
    assert datetime.fromisoformat(report.date).tzinfo is not None
    assert report.hardware == machine(torch.device("cpu"))
    assert report.command == command_line()
    assert report.changed is not None
    assert {"model_name", "data_path", "epochs_ft"} <= {*report.changed} < {*config.to_dict()}
    assert not report.imagenet
    rows = [json.loads(line) for line in (config.save_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[1]["top1"] == summary["final"]["top1"]


def test_the_demo_shows_a_drop_beyond_chance_and_the_steps_after_it(report: RunReport) -> None:
    assert report.uncompensated is not None
    dense, dropped = report.base.top1 / 100, report.uncompensated.top1 / 100
    variance = dense * (1 - dense) + dropped * (1 - dropped)
    assert dense - dropped > 3 * (variance / report.images["val"]) ** 0.5
    assert report.keep_ratio == 0.5
    assert report.base.macs > report.pruned.macs == report.final.macs
    table = report.table()
    for step in ("dense", "no compensation", "mean shift", "fine-tuned", "MACs", "params", "latency"):
        assert step in table


def test_the_log_is_whole(config: RunConfig, report: RunReport) -> None:
    text = (config.save_dir / "vbp_imagenet.log").read_text()
    for part in (
        "32x32 pixels",
        "901 images",
        "dense: top-1",
        "plan (global",
        "epoch 1/1",
        *report.table().splitlines(),
    ):
        assert part in text
    assert logging.getLogger("vbp").level == logging.NOTSET


@pytest.mark.parametrize("name", ["best", "final"])
def test_checkpoints_have_the_accuracy_of_the_summary(config: RunConfig, report: RunReport, name: str) -> None:
    file = config.save_dir / f"vbp_{name}.pth"
    torch.load(file, weights_only=True)
    images = list_images(config.data_path, "val", 10)
    transform = evaluation_transform(PREPROCESSING)
    loader = make_loader(images, transform, batch_size=config.val_batch_size, num_workers=0)
    accuracy = evaluate(load_pruned(file), loader, "cpu")
    measured = getattr(report, name)
    assert (accuracy.top1, accuracy.top5) == (measured.top1, measured.top5)
    assert read_artifact(file).metrics == {
        "epoch": measured.epoch, "top1": measured.top1, "top5": measured.top5, "images": 896
    }  # fmt: skip


def test_the_folder_holds_the_best_model_and_what_is_known_of_it(config: RunConfig, report: RunReport) -> None:
    folder = Path(report.files["artifact"])
    assert folder == config.save_dir / "artifact"
    artifact, best = read_artifact(folder), read_artifact(config.save_dir / "vbp_best.pth")
    assert artifact.weights.keys() == best.weights.keys()
    assert all(torch.equal(artifact.weights[name], best.weights[name]) for name in best.weights)
    assert (artifact.plans, artifact.source) == ((PruningPlan.load(config.save_dir / "plan.json"),), best.source)
    assert artifact.preprocessing == PREPROCESSING
    assert artifact.class_names == best.class_names == tuple("0123456789")
    metrics, settings = artifact.metrics or {}, artifact.settings or {}
    assert (metrics["top1"], metrics["epoch"], metrics["images"]) == (report.best.top1, report.best.epoch, 896)
    for label, measured in (("dense", report.base), ("uncompensated", report.uncompensated), ("best", report.best)):
        assert measured is not None
        assert {name: metrics[label][name] for name in ("top1", "macs", "params")} == {
            name: getattr(measured, name) for name in ("top1", "macs", "params")
        }
    assert settings["global_pruning"] is settings["use_kd"] is True
    assert settings["keep_ratio"] == config.keep_ratio
    # It goes to other people: no path of this machine.
    assert str(config.save_dir.parent) not in (folder / "vbp.json").read_text()
    log = (config.save_dir / "vbp_imagenet.log").read_text()
    assert f'load it with vbp.load_pruned("{folder}")' in log
    assert f"vbp.load_pruned({str(folder)!r})" in (config.save_dir / "report.md").read_text()


def test_a_run_can_be_repeated_from_its_report(report: RunReport, tmp_path: Path) -> None:
    again = dataclasses.replace(RunConfig.from_dict(dict(report.config)), save_dir=tmp_path / "again")
    repeated = run(again)
    assert (repeated.best, repeated.final.top1) == (report.best, report.final.top1)
    first = torch.load(report.files["vbp_final.pth"], weights_only=True)["state_dict"]
    second = torch.load(repeated.files["vbp_final.pth"], weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_epochs_both_checkpoints_are_the_pruned_model(quick: RunConfig) -> None:
    found = run(quick)
    assert found.pruned == found.best == found.final
    assert found.images == {"calibration": 40, "val": 40}
    best, final = (load_pruned(quick.save_dir / f"vbp_{name}.pth") for name in ("best", "final"))
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(best(images), final(images))
    assert torch.equal(load_pruned(quick.save_dir / "artifact")(images), final(images))


def test_a_pruned_model_that_lacks_its_report_alone_gets_it_by_going_on(
    quick: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vbp.report.html.write_report", _killed)
        with pytest.raises(KeyError):
            run(quick)
    (quick.save_dir / ".report.html.x1y2.part").touch()
    written = (quick.save_dir / "artifact/model.safetensors").stat().st_mtime_ns
    again = dataclasses.replace(quick, resume="auto")
    assert run(again) == RunReport.read(quick.save_dir)
    assert (quick.save_dir / "artifact/model.safetensors").stat().st_mtime_ns == written
    assert not list(quick.save_dir.glob(".*"))
    assert "has ended; its report is written again" in (quick.save_dir / "vbp_imagenet.log").read_text()
    with pytest.raises(InputError, match=r"keep_ratio: 0.5 -> 0.6"):
        run(dataclasses.replace(again, keep_ratio=0.6))


def _killed(*_: object) -> NoReturn:
    raise KeyError


def test_a_second_run_in_the_same_folder_is_refused(quick: RunConfig) -> None:
    with folder_lock(quick.save_dir):
        for overwrite in (False, True):
            with pytest.raises(InputError, match=r"no other job writes, got .*run, into which process \d+"):
                run(dataclasses.replace(quick, overwrite=overwrite))
    assert not quick.save_dir.exists()


def test_a_refused_run_leaves_nothing(quick: RunConfig) -> None:
    images = Path(quick.data_path)
    folders = {path for path in images.rglob("*") if path.is_dir()}
    for place, match in ((images / "train/out", "must lie outside"), (images / "out", "no_statistics")):
        with pytest.raises(InputError, match=match):
            run(dataclasses.replace(quick, save_dir=place, stats_path=Path("no_statistics")))
    assert {path for path in images.rglob("*") if path.is_dir()} == folders
    assert not list(images.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_before_fine_tuning_says_so_in_one_line(
    quick: RunConfig, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vbp.recipes.measure.evaluate", lambda *_, **__: signal.raise_signal(number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert guarded(lambda: [run(quick)].clear()) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    line = f"stopped by {number.name}; there is no checkpoint yet; the same command with --resume auto begins anew\n"
    assert capsys.readouterr().err.endswith(line)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_reading_process_that_is_killed_is_one_line(quick: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_readers(*_: object, **__: object) -> NoReturn:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
        time.sleep(5)  # PyTorch reports it in whatever line is executed
        raise AssertionError

    monkeypatch.setattr("vbp.recipes.run.prune_copy", kill_readers)
    with pytest.raises(InputError, match=r"process \d+, which read images .* \(Killed\), .* --num_workers"):
        run(dataclasses.replace(quick, num_workers=1))


def test_statistics_are_reused_and_refused_for_other_data(quick: RunConfig, tmp_path: Path) -> None:
    first = run(quick)
    stored = quick.save_dir / "statistics.safetensors"
    reusing = dataclasses.replace(quick, stats_path=stored, save_dir=tmp_path / "second")

    def no_pass(*_: object, **__: object) -> Statistics:
        raise AssertionError("the data were read again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vbp.statistics.evidence.collect_statistics", no_pass)
        second = run(reusing)
    assert second.sites == first.sites
    assert PruningPlan.load(tmp_path / "second/plan.json") == PruningPlan.load(quick.save_dir / "plan.json")
    for change in ({"calib_samples": 41}, {"seed": 1}, {"crop_pct": 0.9}):
        other = dataclasses.replace(reusing, **change, save_dir=tmp_path / "third")
        with pytest.raises(InputError, match="must hold statistics of this data"):
            run(other)
    assert not list((tmp_path / "third").glob("*"))


def test_statistics_without_attention_are_refused_for_it_before_anything_is_lost(quick: RunConfig) -> None:
    run(quick)
    stored = quick.save_dir / "statistics.safetensors"
    before = {entry.name: entry.read_bytes() for entry in quick.save_dir.iterdir() if entry.is_file()}
    with pytest.raises(InputError, match=r"must hold 64 channels of blocks\.0\.attn\.proj, got none"):
        run(dataclasses.replace(quick, bottleneck=True, stats_path=stored, overwrite=True))
    assert {entry.name: entry.read_bytes() for entry in quick.save_dir.iterdir() if entry.is_file()} == before


def test_lists_of_samples_need_no_class_folders(quick: RunConfig, tmp_path: Path) -> None:
    data = tmp_path / "lists"
    data.mkdir()
    for split in ("train", "val"):
        images = list_images(quick.data_path, split, 10)
        pairs = [(str(images.file(index).resolve()), images.labels[index]) for index in range(len(images))]
        (data / f"{split}_samples.pkl").write_bytes(pickle.dumps(pairs))
    found = run(dataclasses.replace(quick, data_path=str(data), limit_val=0))
    assert found.images["val"] == 896
    assert found.base.top1 > 95
    assert read_artifact(quick.save_dir / "artifact").class_names is None


def test_scope_normalisation_and_rounding_do_what_they_say(quick: RunConfig, tmp_path: Path) -> None:
    def widths(**changes: object) -> list[int]:
        folder = tmp_path / "-".join(f"{name}={value}" for name, value in changes.items())
        found = run(dataclasses.replace(quick, save_dir=folder, **changes))
        return [kept for kept, _ in found.sites.values()]

    assert widths(global_pruning=False) == [128] * 4
    assert widths(global_pruning=False, keep_ratio=0.601) == [154, 154, 154, 153]
    assert widths(global_pruning=False, keep_ratio=0.601, equal_widths=True) == [154] * 4
    plain, normed = widths(keep_ratio=0.6), widths(keep_ratio=0.6, norm_per_layer=True)
    assert sum(plain) == sum(normed) == round(1024 * 0.6)
    assert plain != normed
    assert all(width % 16 == 0 for width in widths(round_to=16))
    assert min(widths(keep_ratio=0.25, min_keep_ratio=0.2)) >= 0.2 * 256


def test_compensation_none_differs_from_the_mean(quick: RunConfig, tmp_path: Path) -> None:
    shifted = run(dataclasses.replace(quick, compare_uncompensated=True, limit_val=300))
    bare = run(dataclasses.replace(quick, compensation="none", limit_val=300, save_dir=tmp_path / "none"))
    assert shifted.uncompensated is not None
    assert bare.pruned.top1 == shifted.uncompensated.top1 != shifted.pruned.top1


def test_results_of_another_run_are_kept_unless_told_otherwise(quick: RunConfig) -> None:
    run(quick)
    before = {entry.name: entry.read_bytes() for entry in quick.save_dir.iterdir() if entry.is_file()}
    with pytest.raises(InputError, match=r"must be empty or new, got .* pass --overwrite"):
        run(quick)
    wrong = dataclasses.replace(quick, overwrite=True, checkpoint=Path("absent.pth"))
    with pytest.raises(InputError, match=r"absent\.pth"):
        run(wrong)
    assert {entry.name: entry.read_bytes() for entry in quick.save_dir.iterdir() if entry.is_file()} == before
    own = [quick.save_dir / "notes.txt", quick.save_dir / "artifact" / "README.md"]
    for file in own:
        file.write_text("mine")
    run(dataclasses.replace(quick, overwrite=True, keep_ratio=0.6))
    assert [file.read_text() for file in own] == ["mine", "mine"]
    assert read_artifact(quick.save_dir / "artifact").plans[0].keep_ratio == 0.6


def test_no_model_of_an_earlier_run_stays_beside_a_run_that_failed(
    quick: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(quick)
    (quick.save_dir / "artifact" / "README.md").write_text("mine")
    monkeypatch.setattr("vbp.recipes.run.prune_copy", lambda *given, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(dataclasses.replace(quick, overwrite=True))
    assert [file.name for file in (quick.save_dir / "artifact").iterdir()] == ["README.md"]


def test_somebody_elses_model_in_the_way_is_found_before_the_work(quick: RunConfig) -> None:
    foreign = quick.save_dir / "artifact" / "model.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"theirs")
    with pytest.raises(InputError, match=r"holds model\.safetensors of something else"):
        run(dataclasses.replace(quick, overwrite=True))
    assert [file.name for file in quick.save_dir.iterdir()] == ["artifact"]
    assert foreign.read_bytes() == b"theirs"


def test_a_disk_that_fills_is_one_error_and_leaves_earlier_files_whole(
    quick: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tuning.save_pruned

    def fills_at_the_last_checkpoint(model: torch.nn.Module, path: Path, **arguments: object) -> None:
        if path.name == "vbp_final.pth":
            monkeypatch.setattr(torch, "save", _no_space)
        real(model, path, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "save_pruned", fills_at_the_last_checkpoint)
    with pytest.raises(OSError, match=r"vbp_final\.pth could not be written .*No space left"):
        run(quick)
    assert {entry.name for entry in quick.save_dir.iterdir() if entry.is_file()} == {
        "vbp_imagenet.log", "config.json", "statistics.safetensors", "plan.json", "metrics.jsonl", "vbp_best.pth",
    }  # fmt: skip
    load_pruned(quick.save_dir / "vbp_best.pth")
    assert not (quick.save_dir / "artifact").exists()
    assert "stopped: OutputError" in (quick.save_dir / "vbp_imagenet.log").read_text()


def test_a_log_that_cannot_be_written_is_the_same_one_error(
    quick: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_after_the_plan(handler: logging.StreamHandler[TextIO], record: logging.LogRecord) -> None:
        if "plan (" in record.getMessage():
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                handler.handleError(record)

    monkeypatch.setattr(logging.FileHandler, "emit", full_after_the_plan)
    with pytest.raises(OSError, match=r"vbp_imagenet\.log could not be written .*No space left"):
        run(quick)
    assert PruningPlan.load(quick.save_dir / "plan.json").kept == 512


def _no_space(content: object, file: object) -> None:
    file.write(b"part")  # type: ignore[attr-defined]
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.3}, r"keep_ratio must be in \(0, 1\], got 1.3"),
        ({"min_keep_ratio": 0.9}, "min_keep_ratio must not exceed keep_ratio"),
        ({"keep_ratio": 1e-6, "min_keep_ratio": 0.0}, "must ask for one of the 1024 hidden channels .* got 1e-06"),
        ({"data_path": "absent"}, "data_path must hold train/<class>/ and val/<class>/, got no folder absent"),
        ({"model_name": "vit_of_nobody"}, "vit_of_nobody"),
        ({"model_type": "swin"}, "swin"),
        ({"checkpoint": Path("absent.safetensors")}, "absent.safetensors"),
        ({"model_kwargs": {}, "allow_random_init": True, "checkpoint": None}, "1000"),
        ({"round_to": 1000}, "keep_ratio 0.5 with round_to 1000 .* removes none of 1024 channels"),
        ({"device": "cuda:99"}, "device must be auto, cpu, cuda"),
        ({"device": "abacus"}, "device must be auto, cpu, cuda"),
        ({"stats_path": Path("absent")}, "statistics file must exist"),
        ({"attn_keep_ratio": 0.8}, "attn_keep_ratio changes nothing"),
        ({"attn_keep_ratio": 1.8, "bottleneck": True}, r"attn_keep_ratio must be in \(0, 1\], got 1.8"),
        ({"val_batch_size": 0}, "val_batch_size must be at least 1, got 0"),
        ({"kd_T": 0.0, "use_kd": True, "epochs_ft": 1}, "kd_T must be above 0"),
        (
            {"use_kd": True, "mixup": 0.2},
            "use_kd, mixup change nothing without fine-tuning, got them with epochs_ft 0",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(quick: RunConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(quick, **changes))
    assert not quick.save_dir.exists() or not list(quick.save_dir.iterdir())


def test_statistics_stop_when_the_plan_has_converged(quick: RunConfig) -> None:
    found = run(dataclasses.replace(quick, calib_samples="auto"))
    assert found.convergence is not None
    stages = found.convergence["stages"]
    assert [stage["images"] for stage in stages] == [451, 901]
    assert found.convergence["converged"] == 901
    assert found.images["calibration"] == 901
    assert "converged at 901 images" in (quick.save_dir / "vbp_imagenet.log").read_text()


def test_the_flags_for_speed_and_memory_work_together(quick: RunConfig) -> None:
    found = run(
        dataclasses.replace(
            quick, amp="bf16", grad_checkpointing=True, matmul_precision="highest", grad_accum=2, epochs_ft=1,
            use_kd=True, lr_ft=5e-4, num_workers=1, prefetch=3,
        )
    )  # fmt: skip
    assert found.final.epoch == 1
    assert found.best.top1 > 75
    state = load_pruned(quick.save_dir / "vbp_final.pth").state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_one_step_is_tried_and_leaves_no_trace(quick: RunConfig) -> None:
    job = prepare(dataclasses.replace(quick, epochs_ft=1, use_kd=True), Session())
    before = {name: value.clone() for name, value in job.dense.state_dict().items()}
    state = torch.get_rng_state()
    tuning.dry_run(job)
    assert all(torch.equal(before[name], value) for name, value in job.dense.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.requires_grad for parameter in job.dense.parameters())
    assert not any(module.training for module in job.dense.modules())


def test_a_step_that_does_not_fit_ends_the_run_before_it_begins(
    quick: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(dataclasses.replace(quick, epochs_ft=1), Session())

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("vbp.training.trainer.Trainer.train_epoch", full)
    with pytest.raises(InputError, match=r"more memory than there is.*lower --train_batch_size"):
        tuning.dry_run(job)


def test_corrupt_images_are_named_and_left_out(quick: RunConfig, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_digits(data)
    victim = sorted((data / "val/3").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:30])
    found = run(dataclasses.replace(quick, data_path=str(data), limit_val=0))
    assert found.images["val"] == 895
    assert victim.name in (quick.save_dir / "vbp_imagenet.log").read_text()


def test_the_dense_model_stays_as_it_was(quick: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = vbp.recipes.run.finetune

    def finetune(job: Job, pruned: nn.Module, *rest: Any, **more: Any) -> RunReport:
        report = real(job, pruned, *rest, **more)
        seen.extend((job, pruned))
        return report

    monkeypatch.setattr("vbp.recipes.run.finetune", finetune)
    tuned = dataclasses.replace(quick, compensation="refit", epochs_ft=1, use_kd=True, train_batch_size=256)
    run(dataclasses.replace(tuned, calib_samples=80))
    job, pruned = seen
    fresh = load_classifier(MODEL_NAME, checkpoint=WEIGHTS, model_kwargs=MODEL_KWARGS).model.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in job.dense.state_dict().items())
    assert count_parameters(pruned) < count_parameters(job.dense)


def test_where_no_epoch_is_better_table_and_summary_say_which_row_each_file_is(quick: RunConfig) -> None:
    report = run(dataclasses.replace(quick, epochs_ft=1, lr_ft=0.9))
    assert (report.best.epoch, report.final.epoch) == (0, 1)
    told = (
        "no epoch was better than none: artifact/ and vbp_best.pth hold the row 'pruned, mean shift', "
        "vbp_final.pth 'fine-tuned, final (epoch 1)'"
    )
    folder = quick.save_dir
    assert told in report.table()
    assert told in (folder / "vbp_imagenet.log").read_text()
    rows = json.loads((folder / "summary.json").read_text())["file_rows"]
    assert rows == {"artifact": "pruned", "vbp_best.pth": "pruned", "vbp_final.pth": "final"}
    for file, name in rows.items():
        metrics = read_artifact(folder / file).metrics or {}
        assert (metrics["top1"], metrics["epoch"]) == (report.models[name].top1, report.models[name].epoch)


def test_a_run_has_one_paired_speedup_with_its_conditions(config: RunConfig, report: RunReport) -> None:
    timed = report.latency
    assert timed is not None
    assert (timed.device, timed.precision) == ("cpu", "float32")
    assert timed.batch == 32
    assert timed.rounds >= 3
    assert timed.speedup.low <= timed.speedup.median <= timed.speedup.high
    assert json.loads((config.save_dir / "summary.json").read_text())["latency"] == to_json(timed)
    log = (config.save_dir / "vbp_imagenet.log").read_text()
    assert f"speed-up {timed.speedup_text} at {timed.conditions}: {timed.latency_text}" in log
    assert timed.speedup_text in report.table()
    assert timed.speedup_text in (config.save_dir / "report.md").read_text()
    # A checkpoint holds it, for the attempt that goes on.
    path = latest_checkpoint(config.save_dir / "checkpoints")
    assert path is not None
    state = read_checkpoint(path)
    assert RunReport.from_dict(state["report"]).latency == timed


def test_log_lines_tell_the_standard_errors(config: RunConfig, report: RunReport) -> None:
    log = (config.save_dir / "vbp_imagenet.log").read_text()
    for label, model in (("dense", report.base), ("pruned", report.pruned)):
        assert f"{label}: top-1 {model.top1_text} %, top-5 {model.top5_text} %" in log
    assert f"top-1 {report.final.top1_text} %" in log
    assert "±" in report.base.top1_text
