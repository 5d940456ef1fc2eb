"""The whole job on two processes: what one process finds, errors that end all, runs that go on by themselves."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import DRIVE, environment, finish, summary, torchrun, wait_for, weights, written
from threads import single_thread

from vbp import PruningPlan, RunConfig, RunReport, Statistics, load_pruned, run
from vbp.recipes.config import DemoConfig
from vbp.recipes.demo import demo_run_config

BATCH = 32
PRUNE_ONLY = {
    "epochs_ft": 0, "use_kd": False, "lr_ft": RunConfig.lr_ft, "train_batch_size": RunConfig.train_batch_size
}  # fmt: skip
# Where only the end of a job matters: no search, no refit, a few images.
SHORT = {
    "criterion": "variance", "compensation": "mean", "global_pruning": True, "compare_uncompensated": False,
    "calib_samples": 100, "limit_val": 100, "val_batch_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return the demo's configuration, cut to two epochs; two processes take half the batch each."""
    folder = tmp_path_factory.mktemp("torchrun")
    whole = demo_run_config(DemoConfig(folder=demo_folder, epochs_ft=2, criterion="auto", compensation="refit"))
    return dataclasses.replace(
        whole, overwrite=False, train_batch_size=BATCH, latency_batch=1, save_dir=folder / "run"
    )


@pytest.fixture(scope="module")
def alone(config: RunConfig) -> RunReport:
    """Return the report of one process with the same images a step."""
    folder = config.save_dir.parent / "alone"
    with single_thread():
        return run(dataclasses.replace(config, save_dir=folder, train_batch_size=2 * BATCH))


@pytest.fixture(scope="module")
def together(config: RunConfig) -> Path:
    """Return the folder of a run of two processes."""
    folder = config.save_dir.parent / "together"
    result = finish(torchrun(DRIVE, written(config, folder)))
    assert result.returncode == 0, result.stderr
    # One process tells the story.
    assert result.stderr.count("results in") == 1
    assert "[process 1]" not in result.stderr
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pruned(folder / "artifact")(images), load_pruned(folder / "vbp_best.pth")(images))
    return folder


def test_two_processes_find_the_statistics_and_the_plan_of_one(alone: RunReport, together: Path) -> None:
    here, there = (Statistics.load(Path(folder) / "statistics.safetensors") for folder in (_folder(alone), together))
    assert here.images == there.images == alone.images["calibration"]
    for name, moments in here.moments.items():
        assert there.moments[name].count == moments.count
        torch.testing.assert_close(there.moments[name].mean, moments.mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(there.moments[name].variance, moments.variance, rtol=1e-5, atol=1e-9)
    assert PruningPlan.load(together / "plan.json") == PruningPlan.load(_folder(alone) / "plan.json")


def test_two_processes_find_the_refit_of_one(alone: RunReport, together: Path) -> None:
    here, there = (Statistics.load(Path(folder) / "statistics.safetensors") for folder in (_folder(alone), together))
    for name, covariance in here.covariances.items():
        scale = float(covariance.m2.diagonal().max())
        torch.testing.assert_close(there.covariances[name].m2, covariance.m2, rtol=1e-5, atol=1e-6 * scale)
    found, expected = summary(together), alone.to_dict()
    assert [one["name"] for one in found["candidates"]] == [one["name"] for one in expected["candidates"]]
    for one, other in zip(found["candidates"], expected["candidates"], strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-3, abs=1e-6)
    assert found["reconstruction"].keys() == expected["reconstruction"].keys()
    for name, errors in expected["reconstruction"].items():
        assert found["reconstruction"][name] == pytest.approx(errors, rel=1e-5)
    assert found["head"]["layer"] == expected["head"]["layer"]
    assert found["head"]["after"] == pytest.approx(expected["head"]["after"], rel=1e-2)


def test_two_processes_count_the_right_answers_of_one_to_the_image(alone: RunReport, together: Path) -> None:
    found, expected = summary(together), alone.to_dict()
    for model in ("base", "pruned", "uncompensated"):
        for figure in ("top1", "top5", "images", "macs", "params"):
            assert found[model][figure] == expected[model][figure], (model, figure)
    assert (found["processes"], expected["processes"]) == (2, 1)


def test_two_processes_train_as_one_does_with_their_batches_together(alone: RunReport, together: Path) -> None:
    # The same gradients, summed in another order; in float64 they are compared where the trainer is tested.
    here, there = (_untimed(folder) for folder in (_folder(alone), together))
    assert [row["epoch"] for row in there] == [0, 1, 2]
    for name, tolerance in (("train_loss", 2e-3), ("train_top1", 0.5), ("top1", 0.5), ("lr", 0.0)):
        found, expected = ([row[name] for row in rows[1:]] for rows in (there, here))
        assert found == pytest.approx(expected, abs=tolerance), name
    assert [row["images"] for row in there[1:]] == [row["images"] for row in here[1:]]


def test_a_job_of_two_goes_on_by_itself_when_a_process_dies(config: RunConfig, together: Path) -> None:
    folder = config.save_dir.parent / "restarted"
    file = written(config, folder, checkpoint_minutes=1e-9)
    launcher = ("--standalone", "--nproc_per_node=2", "--max-restarts=1")
    result = finish(torchrun(DRIVE, file, "training", "1", "once", launcher=launcher))
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stderr
    first, second = weights(together / "vbp_final.pth"), weights(folder / "vbp_final.pth")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert _untimed(together) == _untimed(folder)


@pytest.mark.parametrize("stage", ["calibration", "evaluation", "training"])
def test_an_error_of_one_process_ends_the_job_with_its_message(config: RunConfig, stage: str) -> None:
    folder = config.save_dir.parent / f"error-{stage}"
    start = time.monotonic()
    result = finish(torchrun(DRIVE, written(config, folder, **SHORT), stage, "1", "error"))
    assert result.returncode != 0
    assert "ValueError: the image fell over" in result.stderr
    assert "stopped: process 1 of 2 failed: the image fell over" in result.stderr
    assert time.monotonic() - start < 120
    assert "stopped: PeerError" in (folder / "vbp_imagenet.log").read_text()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_without_a_word_ends_the_job(config: RunConfig, rank: str) -> None:
    folder = config.save_dir.parent / f"killed-{rank}"
    result = finish(torchrun(DRIVE, written(config, folder, **SHORT), "training", rank, "exit"))
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if "stopped: " in line]
    assert len(said) == 1, result.stderr
    assert said[0].startswith("[process 1] " if rank == "0" else "stopped: ")
    # It saw the loss, or was told to stop first.
    assert "another process ended without an error message" in said[0] or "process 0, which reports it" in said[0]


def test_a_process_that_hangs_ends_the_job_after_the_time_out(config: RunConfig) -> None:
    folder = config.save_dir.parent / "hung"
    start = time.monotonic()
    result = finish(
        torchrun(DRIVE, written(config, folder, timeout_minutes=0.15, **SHORT), "calibration", "1", "hang")
    )
    assert result.returncode != 0
    assert "stopped: another process ended without an error message" in result.stderr
    assert time.monotonic() - start < 150


def test_two_processes_that_are_told_to_stop_go_on_where_they_were(config: RunConfig, together: Path) -> None:
    folder = config.save_dir.parent / "stopped"
    file = written(config, folder, checkpoint_minutes=1e-9)
    job = subprocess.Popen(torchrun(DRIVE, file), env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(folder, job, "checkpoints/epoch0001*")
    job.terminate()  # torchrun passes it on to both
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "stopped by SIGTERM in epoch" in errors
    result = finish(torchrun(DRIVE, written(config, folder, resume="auto")))
    assert result.returncode == 0, result.stderr
    first, second = weights(together / "vbp_final.pth"), weights(folder / "vbp_final.pth")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert _untimed(together) == _untimed(folder)


def test_four_processes_find_the_moments_of_one_to_rounding() -> None:
    result = finish(torchrun(DRIVE.parent / "shares.py", launcher=("--standalone", "--nproc_per_node=4")))
    assert result.returncode == 0, result.stderr


def test_two_nodes_on_one_host_do_the_job_on_tar_shards(config: RunConfig, together: Path) -> None:
    folder = config.save_dir.parent / "nodes"
    shards = tar_shards(Path(config.data_path), config.save_dir.parent / "shards")
    file = written(config, folder, data_path=f"wds/{shards}", **PRUNE_ONLY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}")
    nodes = [
        subprocess.Popen(
            torchrun(DRIVE, file, launcher=(*where, f"--node_rank={rank}")),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    # No image lost or doubled: the same ones as from folders, on both splits.
    for model in ("base", "pruned"):
        for figure in ("top1", "top5", "images"):
            assert summary(folder)[model][figure] == summary(together)[model][figure]
    assert summary(folder)["images"] == summary(together)["images"]
    assert PruningPlan.load(folder / "plan.json") == PruningPlan.load(together / "plan.json")


def test_bad_input_is_one_error_of_the_whole_job(config: RunConfig) -> None:
    folder = config.save_dir.parent / "refused"
    result = finish(torchrun(DRIVE, written(config, folder, data_path="absent")))
    assert result.returncode != 0
    assert len([line for line in result.stderr.splitlines() if "error: data_path must" in line]) == 1
    assert not folder.exists() or not list(folder.iterdir())


def tar_shards(data: Path, target: Path) -> Path:
    """Pack images into WebDataset shards: uneven ones and an empty one for training, one for validation."""
    target.mkdir()
    for split, sizes in (("train", (600, 301, 0)), ("val", (896,))):
        samples = [(file, label) for label in range(10) for file in sorted((data / split / str(label)).iterdir())]
        for number, size in enumerate(sizes):
            with tarfile.open(target / f"digits-{split}-{number:04}.tar", "w") as shard:
                for file, label in samples[sum(sizes[:number]) : sum(sizes[:number]) + size]:
                    shard.add(file, f"{file.stem}-{label}{file.suffix}")
                    info = tarfile.TarInfo(f"{file.stem}-{label}.cls")
                    info.size = 1
                    shard.addfile(info, io.BytesIO(str(label).encode()))
    return target


def _folder(report: RunReport) -> Path:
    return Path(report.config["save_dir"])


def _untimed(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
