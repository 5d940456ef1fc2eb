"""Write the files that vbp reads, each whole in a folder of its own, and read them: imported by `fault_files.py`."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

import vbp
from vbp.cost.timing import LatencyComparison, Spread
from vbp.data.data_path import list_images
from vbp.data.loader import make_loader
from vbp.data.preprocessing import evaluation_transform
from vbp.deploy.artifact import rebuild_
from vbp.errors import InputError
from vbp.models.load import load_classifier
from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import prune_
from vbp.recipes.config import RunConfig
from vbp.recipes.resume import find_checkpoint
from vbp.report.finished_run import read_run
from vbp.report.run_report import Measured
from vbp.runtime.decode import to_json
from vbp.runtime.fingerprints import json_fingerprint, model_fingerprint
from vbp.runtime.sealed import write_sealed
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.rows import SweepRow
from vbp.sweeps.state import POINTS, ROW, SweepState, read_progress, read_rows, write_row, write_state
from vbp.training.checkpoints import FORMAT, checked_content, read_checkpoint, save_checkpoint

CLASSES: Final = 3
_NAME, _ARGUMENTS = "test_vit", {"num_classes": CLASSES}
Parse = Callable[[bytes], Any]
Write = Callable[[Any], bytes]


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        name: What tables call it.
        file: Its path in the folder.
        write: Writes the folder, whole.
        read: Reads the file as vbp does, and returns a fingerprint of what came of it.
        whole: Whether a digest or the like covers the content, so that no other content may be read; where the
            content is made by hand or by other programs, another value is as good as the first.
        parse: Returns the values in the file, for changes of single values; None where there are none.
        format: The inverse of `parse`, with a valid digest.
    """

    name: str
    file: str
    write: Callable[[Path], None]
    read: Callable[[Path], str]
    whole: bool = False
    parse: Parse | None = None
    format: Write | None = None


def _classifier() -> vbp.Classifier:
    torch.manual_seed(0)
    return load_classifier(_NAME, allow_random_init=True, model_kwargs=_ARGUMENTS)


def _pruned() -> tuple[vbp.Classifier, PruningPlan, vbp.Statistics]:
    classifier = _classifier()
    images = [torch.randn(4, 3, *classifier.preprocessing.img_size, generator=torch.Generator().manual_seed(1))]
    sites = vbp.find_sites(classifier.model, classifier.example_input())
    statistics = vbp.collect_statistics(classifier.model, sites, images)
    plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=0.5)
    prune_(classifier.model, plan, statistics.means)
    return classifier, plan, statistics


def _write_pruned(place: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        classifier, plan, _ = _pruned()
        vbp.save_pruned(
            classifier.model, folder / place, plans=plan, source=classifier.source,
            preprocessing=classifier.preprocessing, class_names=("a", "b", "c"), metrics={"top1": 50.0},
        )  # fmt: skip

    return write


def _read_pruned(place: str) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        artifact = vbp.read_artifact(folder / place)
        described = to_json([artifact.preprocessing, artifact.class_names, artifact.metrics, artifact.versions])
        return model_fingerprint(vbp.load_pruned(folder / place)) + json_fingerprint(described)

    return read


def _write_statistics(folder: Path) -> None:
    _pruned()[2].save(folder / "statistics.safetensors")


def _read_statistics(folder: Path) -> str:
    statistics = vbp.Statistics.load(folder / "statistics.safetensors")
    statistics.variances  # noqa: B018 (it must be possible)
    values = [
        [name, seen.count, seen.mean.tolist(), seen.m2.tolist()] for name, seen in sorted(statistics.moments.items())
    ]
    return json_fingerprint([values, statistics.images, statistics.model, statistics.data])


def _write_plan(folder: Path) -> None:
    _pruned()[1].save(folder / "plan.json")


def _read_plan(folder: Path) -> str:
    plan, model = PruningPlan.load(folder / "plan.json"), _classifier().model
    prune_(model, plan)
    return model_fingerprint(model) + json_fingerprint(plan.to_dict())


def _write_checkpoint(folder: Path) -> None:
    classifier, plan, _ = _pruned()
    state = {"settings": {"seed": 0}, "plan": plan.to_dict(), "trainer": {"student": classifier.model.state_dict()}}
    save_checkpoint(folder, {**state, "rows": [{"epoch": 1, "top1": 5.0}]}, epoch=1, batch=2)


def _read_checkpoint(folder: Path) -> str:
    path, model = folder / "checkpoints" / "epoch0001-batch000002.pt", _classifier().model
    state = read_checkpoint(path)
    with checked_content(path):
        plan = PruningPlan.from_dict(state["plan"])
        rebuild_(model, (plan,), state["trainer"]["student"])
        return model_fingerprint(model) + json_fingerprint([state["settings"], plan.to_dict(), state["rows"]])


def _settings() -> dict[str, Any]:
    return RunConfig(data_path="data", model_name=_NAME).to_dict()


def _write_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(_settings(), indent=2))


def _read_config(folder: Path) -> str:
    return str(find_checkpoint("auto", folder, _settings()))


def _latency() -> Any:
    spread = Spread(9.0, 8.0, 10.0)
    return to_json(LatencyComparison(spread, spread, spread, 8, "cpu", "float32", "wall", 5, 1.0, None))


def _write_run(folder: Path) -> None:
    _write_plan(folder)
    _write_statistics(folder)
    plan = PruningPlan.load(folder / "plan.json")
    dense: dict[str, Any] = {"top1": 70.0, "top5": 90.0, "macs": 10**9, "params": 5 * 10**6, "images": 500}
    small = {**dense, "macs": 7 * 10**8, "epoch": 1}
    summary = {
        "base": dense, "pruned": small, "best": small, "final": small, "keep_ratio": plan.kept / plan.total,
        "sites": {name: list(widths) for name, widths in plan.widths.items()}, "images": {"val": 500},
        "latency": _latency(), "device": "cpu", "processes": 1, "versions": {"torch": "2"},
        "config": _settings(), "seconds": {"calibration": 1.0},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    rows = [{"epoch": epoch, "top1": 60.0 + epoch, "top5": 80.0, "train_loss": 1.0} for epoch in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_run(folder: Path) -> str:
    finished = read_run(folder)
    finished.report.table()
    return json_fingerprint([finished.report.to_dict(), to_json(finished.epochs)])


def _sweep(folder: Path) -> SweepConfig:
    return SweepConfig(save_dir=folder, data_path="data", model_name=_NAME)


def _swept() -> tuple[SweepState, list[SweepRow]]:
    dense: dict[str, Any] = {"top1": 70.0, "top5": 90.0, "macs": 10**9, "params": 5 * 10**6, "images": 500}
    row = {"criterion": "variance", "compensation": "mean", "scope": "global", "keep_ratio": 0.5}
    row |= {**dense, "kept": 5, "total": 10, "latency": _latency()}
    rows = [SweepRow.from_dict(one) for one in (row, {**row, "keep_ratio": 0.4})]
    state = SweepState({"seed": 0, "model": "a"}, Measured(**dense), tuple(row.point for row in rows))
    return state, rows


def _write_sweep(folder: Path) -> None:
    state, rows = _swept()
    write_state(folder, state, {row.point: row for row in rows})


def _write_point(folder: Path) -> None:
    state, rows = _swept()
    write_row(folder, state, rows[0])


def _read_point(folder: Path) -> str:
    return json_fingerprint(to_json([*read_rows(folder, _swept()[0]).values()]))


def _read_sweep(folder: Path) -> str:
    progress = read_progress(_sweep(folder))
    return json_fingerprint(None if progress is None else to_json(progress))


def _picture(number: int) -> Image.Image:
    noise = torch.randint(0, 256, (48, 40, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def _write_images(folder: Path) -> None:
    for split in ("train", "val"):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number, suffix in enumerate(("png", "jpg", "webp", "tiff")):
                _picture(label * 10 + number).save(folder / split / f"class{label}" / f"{number}.{suffix}")


def _read_images(folder: Path | str) -> str:
    images = list_images(folder, "train", CLASSES)
    transform = evaluation_transform(vbp.Preprocessing((32, 32), 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3))
    loader = make_loader(images, transform, batch_size=16, num_workers=0)
    pixels = hashlib.sha256(b"".join(batch.numpy().tobytes() + labels.numpy().tobytes() for batch, labels in loader))
    if loader.unreadable:  # it is named, and left out
        raise InputError("; ".join(loader.unreadable))
    return pixels.hexdigest() + images.fingerprint()


def _write_samples(folder: Path) -> None:
    _write_images(folder)
    images = list_images(folder, "train", CLASSES)
    (folder / "train_samples.pkl").write_bytes(pickle.dumps([*zip(images.paths, images.labels, strict=True)]))
    (folder / "train_index.jsonl").unlink()


def _write_index(folder: Path) -> None:
    _write_images(folder)
    list_images(folder, "train", CLASSES)


def _write_shards(folder: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number in range(6):
                _picture(number).save(folder / "image.png")
                tar.add(folder / "image.png", f"{'long' * 30}{number}.png")
                (folder / "label.cls").write_text(str(number % CLASSES))
                tar.add(folder / "label.cls", f"{'long' * 30}{number}.cls")
    for name in ("image.png", "label.cls"):
        (folder / name).unlink()


def _read_shards(folder: Path) -> str:
    return _read_images(f"wds/{folder}")


def _write_shard_index(folder: Path) -> None:
    _write_shards(folder)
    list_images(f"wds/{folder}", "train", CLASSES)


def _write_weights(name: str, *, zipped: bool = True) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = _classifier().model.state_dict()
        if name.endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file(state, folder / name)
        else:
            torch.save(state, folder / name, _use_new_zipfile_serialization=zipped)

    return write


def _read_weights(name: str) -> Callable[[Path], str]:
    return lambda folder: model_fingerprint(
        load_classifier(_NAME, checkpoint=folder / name, model_kwargs=_ARGUMENTS).model
    )


def _write_huggingface(folder: Path) -> None:
    import transformers  # takes seconds, and the other files do not need it

    config = transformers.ViTConfig(  # type: ignore[call-arg]
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32,
        patch_size=16, num_labels=CLASSES,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)
    processor: Any = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)


def _write_huggingface_pickle(folder: Path) -> None:
    _write_huggingface(folder)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _read_huggingface(folder: Path) -> str:
    classifier = load_classifier(str(folder))
    return model_fingerprint(classifier.model) + json_fingerprint(to_json(classifier.preprocessing))


def _lines(content: bytes) -> Any:
    return [json.loads(line) for line in content.splitlines()]


def _in_lines(rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _index_lines(rows: Any) -> bytes:
    """Write an index again with a digest that fits."""
    header, *others = rows
    body = _in_lines(others)
    if isinstance(header, dict):
        header = header | {"sha256": hashlib.sha256(body).hexdigest()}
    return _in_lines([header]) + body


def _sealed(name: str) -> Write:
    def write(content: Any) -> bytes:
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            write_sealed(file, content, name)
            return Path(file.name).read_bytes()

    return write


def _unpickled(content: bytes) -> Any:
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(content)
        file.flush()
        return torch.load(file.name, weights_only=True)


def _header(content: bytes) -> Any:
    (size,) = struct.unpack("<Q", content[:8])
    return [json.loads(content[8 : 8 + size]), content[8 + size :].hex()]


def _with_header(parts: Any) -> bytes:
    text = json.dumps(parts[0]).encode()
    return struct.pack("<Q", len(text)) + text + bytes.fromhex(parts[1] if isinstance(parts[1], str) else "")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


_JSON: Final[dict[str, Any]] = {"parse": json.loads, "format": _json}
_SAFETENSORS: Final[dict[str, Any]] = {"parse": _header, "format": _with_header}
READERS: Final = (
    Reader("artefact, vbp.json", "m/vbp.json", _write_pruned("m"), _read_pruned("m"), **_JSON),
    Reader("artefact, weights", "m/model.safetensors", _write_pruned("m"), _read_pruned("m"), True),
    Reader("pruned .pth", "m.pth", _write_pruned("m.pth"), _read_pruned("m.pth"), True, _unpickled,
           _sealed("vbp-pruned/2")),
    Reader("checkpoint to resume", "checkpoints/epoch0001-batch000002.pt", _write_checkpoint, _read_checkpoint, True,
           _unpickled, _sealed(FORMAT)),
    Reader("statistics", "statistics.safetensors", _write_statistics, _read_statistics, True, **_SAFETENSORS),
    Reader("plan.json", "plan.json", _write_plan, _read_plan, **_JSON),
    Reader("config.json of a run", "config.json", _write_config, _read_config, **_JSON),
    Reader("summary.json", "summary.json", _write_run, _read_run, **_JSON),
    Reader("metrics.jsonl", "metrics.jsonl", _write_run, _read_run, False, _lines, _in_lines),
    Reader("sweep.json", "sweep.json", _write_sweep, _read_sweep, **_JSON),
    Reader("point of a sweep", f"{POINTS}/{_swept()[1][0].point.name}/{ROW}", _write_point, _read_point, **_JSON),
    Reader("list of samples", "train_samples.pkl", _write_samples, _read_images, False, pickle.loads, pickle.dumps),
    Reader("listing index", "train_index.jsonl", _write_index, _read_images, True),
    Reader("listing index, digest fits", "train_index.jsonl", _write_index, _read_images, False, _lines,
           _index_lines),
    Reader("image, PNG", "train/class0/0.png", _write_images, _read_images),
    Reader("image, JPEG", "train/class0/1.jpg", _write_images, _read_images),
    Reader("image, WebP", "train/class0/2.webp", _write_images, _read_images),
    Reader("image, TIFF", "train/class0/3.tiff", _write_images, _read_images),
    Reader("tar shard", "train-0000.tar", _write_shards, _read_shards),
    Reader("shard index", "train_shards.jsonl", _write_shard_index, _read_shards, True),
    Reader("shard index, digest fits", "train_shards.jsonl", _write_shard_index, _read_shards, False, _lines,
           _index_lines),
    Reader("weights, safetensors", "w.safetensors", _write_weights("w.safetensors"),
           _read_weights("w.safetensors"), **_SAFETENSORS),
    Reader("weights, .pth", "w.pth", _write_weights("w.pth"), _read_weights("w.pth")),
    Reader("weights, old .pth", "w.pth", _write_weights("w.pth", zipped=False), _read_weights("w.pth")),
    Reader("Hugging Face config.json", "config.json", _write_huggingface, _read_huggingface, **_JSON),
    Reader("Hugging Face preprocessor", "preprocessor_config.json", _write_huggingface, _read_huggingface, **_JSON),
    Reader("Hugging Face safetensors", "model.safetensors", _write_huggingface, _read_huggingface, **_SAFETENSORS),
    Reader("Hugging Face .bin", "pytorch_model.bin", _write_huggingface_pickle, _read_huggingface),
)  # fmt: skip
