"""Images a second of calibration, evaluation and fine-tuning, beside plain float32 loops written the obvious way.

    python benchmarks/throughput.py
    torchrun --nproc_per_node=4 benchmarks/throughput.py --batch_size 128

All variants take turns in every round of one run; images are synthetic and wait in memory, so what is measured is
the computing and not the disk. One row is an epoch of tuning without labels (`--tune`), mixtures of random crops
included, beside what it is made of: a forward pass of the dense model, and a forward and a backward pass of the
pruned one, in the same precision. With several processes the images of all count; the plain loop is one process, so
its share is what one process does while the others do the same. Prints one JSON line for each variant: images a
second (median over rounds) and the median over rounds of the ratio to the plain loop of that stage.
"""

from __future__ import annotations

import json
import platform
import statistics as stats
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from vbp import Trainer, TrainerSettings, collect_statistics, evaluate, find_sites, make_plan, prune_, variance_scores
from vbp.runtime.precision import Precision, move_, set_matmul_precision
from vbp.runtime.processes import Processes, process_group
from vbp.statistics.images import GivenImages
from vbp.statistics.stream_target import StreamTarget
from vbp.statistics.training_images import training_images
from vbp.training.losses import DistillationLoss
from vbp.training.tuning import STREAM_WEIGHT, VECTOR_RATE


@dataclass(frozen=True)
class Options:
    """Time the stages of a run against plain loops."""

    model_name: str = "deit_tiny_patch16_224"
    """A timm model; random weights cost as much as trained ones."""
    keep_ratio: float = 0.65
    """Share of the channels that the student keeps."""
    batch_size: int = 16
    """Images in a batch of one process."""
    batches: int = 2
    """Batches in one pass."""
    rounds: int = 5
    """Timed passes of each variant."""
    device: str = "auto"
    """Where to run."""
    amp: tuple[str, ...] = ("off", "auto")
    """Precisions to time."""
    compile: bool = False
    """Also time torch.compile."""


class Images:
    """Synthetic batches in the form of a training loader."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], world: int) -> None:
        self.batches, self.world, self.start = batches, world, 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin at a batch."""
        self.start = start

    def global_size(self, batch: int) -> int:
        """Return the images of a batch over all processes."""
        return len(self.batches[batch][1]) * self.world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches[self.start :])


def plain_forward(model: nn.Module, images: Images, device: torch.device) -> None:
    """Evaluate in float32, as one would write it down first."""
    model.eval()
    right = 0
    with torch.no_grad():
        for pixels, labels in images:
            right += int((model(pixels.to(device)).argmax(1) == labels.to(device)).sum())


def plain_finetuning(student: nn.Module, teacher: nn.Module | None, device: torch.device) -> Callable[[Images], None]:
    """Return an epoch of distillation in float32, as one would write it down first."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.01)

    def epoch(images: Images) -> None:
        student.train()
        total = 0.0
        for pixels, labels in images:
            pixels, labels = pixels.to(device), labels.to(device)
            logits = student(pixels)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    target = F.log_softmax(teacher(pixels) / 2, dim=1)
                soft = F.kl_div(F.log_softmax(logits / 2, dim=1), target, reduction="batchmean", log_target=True)
                loss = 0.7 * loss + 0.3 * 4 * soft
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()

    return epoch


def variants(
    options: Options, images: Images, processes: Processes, device: torch.device
) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Return name -> (stage, one pass)."""
    dense = timm.create_model(options.model_name).eval()
    plain_dense = deepcopy(dense).to(device)
    dense = move_(dense, device)
    example = images.batches[0][0][:1].to(device)
    sites = find_sites(dense, example)
    scores = variance_scores(collect_statistics(dense, sites, images.batches, device=device))
    plan = make_plan(sites, scores, keep_ratio=options.keep_ratio, scope="global", round_to=8)
    student, plain_student = deepcopy(dense), deepcopy(plain_dense)
    prune_(student, plan)
    prune_(plain_student, plan)
    taught, alone = (plain_finetuning(deepcopy(plain_student), teacher, device) for teacher in (plain_dense, None))
    found: dict[str, tuple[str, Callable[[], Any]]] = {
        "plain calibration forward": ("calibration", lambda: plain_forward(plain_dense, images, device)),
        "plain evaluation": ("evaluation", lambda: plain_forward(plain_student, images, device)),
        "plain fine-tuning, teacher": ("taught", lambda: taught(images)),
        "plain fine-tuning": ("alone", lambda: alone(images)),
    }
    for precision in dict.fromkeys(Precision.choose(amp, device) for amp in options.amp):  # type: ignore[arg-type]
        found |= _ours(precision, options, dense, student, sites, images, processes, device)
    for precision in dict.fromkeys(Precision.for_tuning(amp, device) for amp in options.amp):  # type: ignore[arg-type]
        found |= _tuning(precision, options, dense, student, sites, images, processes, device)
    return found


def _ours(
    precision: Precision,
    options: Options,
    dense: nn.Module,
    student: nn.Module,
    sites: Any,
    images: Images,
    processes: Processes,
    device: torch.device,
) -> dict[str, tuple[str, Callable[[], Any]]]:
    def calibrate() -> None:
        with precision.autocast():
            collect_statistics(dense, sites, images.batches, device=device)

    found: dict[str, tuple[str, Callable[[], Any]]] = {
        f"calibration, amp {precision.name}": ("calibration", calibrate),
        f"evaluation, amp {precision.name}": (
            "evaluation",
            lambda: evaluate(student, images, device, precision=precision, processes=processes),
        ),
    }
    for compiled in (False, True) if options.compile else (False,):
        for stage, teacher in (("taught", dense), ("alone", None)):
            trainer = Trainer(
                deepcopy(student), TrainerSettings(steps=1_000_000, learning_rate=1e-5, compile=compiled),
                device=device, teacher=None if teacher is None else deepcopy(teacher), precision=precision,
                processes=processes,
            )  # fmt: skip
            name = (
                f"fine-tuning{', teacher' if teacher is not None else ''}, amp {precision.name}"
                + (", compile" if compiled else "")
            )  # fmt: skip
            found[name] = (stage, _epochs(trainer, images))
    return found


def _tuning(
    precision: Precision,
    options: Options,
    dense: nn.Module,
    student: nn.Module,
    sites: Any,
    images: Images,
    processes: Processes,
    device: torch.device,
) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Return an epoch of tuning without labels, and the passes that it is made of."""
    own, teacher = deepcopy(student).train(), deepcopy(dense).requires_grad_(False)

    def passes() -> None:
        for pixels, _ in images:
            with precision.autocast():
                with torch.no_grad():
                    teacher(pixels.to(device))
                logits = own(pixels.to(device))
            own.zero_grad()
            logits.float().logsumexp(1).sum().backward()

    # Each process has its own images here: one alone deals out its list.
    given = GivenImages([pixels for pixels, _ in images])
    stream = StreamTarget.find(teacher, own, sites, images.batches[0][0][:1].to(device), given)
    settings = TrainerSettings(
        steps=1_000_000, learning_rate=1e-5, loss=DistillationLoss(0.0, 1.0, 1.0), vector_rate=VECTOR_RATE,
        ema_decay=0.95, fixed_statistics=True, stream=stream, stream_weight=STREAM_WEIGHT,
    )  # fmt: skip
    trainer = Trainer(
        deepcopy(student), settings, device=device, teacher=deepcopy(dense), precision=precision, processes=processes
    )
    loader = training_images(given, range(len(given)), options.batch_size)
    stage, world = f"tuning, amp {precision.name}", images.world
    return {
        f"plain passes of an epoch of tuning, amp {precision.name}": (stage, passes),
        stage: (stage, _epochs(trainer, _Shares(loader, world))),
    }


class _Shares:
    """A loader of one process, as one of several that have as many images."""

    def __init__(self, loader: Any, world: int) -> None:
        self.loader, self.world = loader, world

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose order and crops of an epoch."""
        self.loader.set_epoch(epoch, start)

    def global_size(self, batch: int) -> int:
        """Return the images of a batch over all processes."""
        return int(self.loader.global_size(batch)) * self.world

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return iter(self.loader)


def _epochs(trainer: Trainer, images: Any) -> Callable[[], Any]:
    count = 0

    def epoch() -> None:
        nonlocal count
        count += 1
        trainer.train_epoch(images, count)

    return epoch


def main(options: Options) -> None:
    """Time all variants in turn and print the medians."""
    set_matmul_precision("highest")
    with process_group(options.device, 30) as (processes, device):
        torch.manual_seed(0)
        size = timm.data.resolve_model_data_config(timm.create_model(options.model_name))["input_size"]  # type: ignore[attr-defined, no-untyped-call]
        batches = [
            (torch.randn(options.batch_size, *size), torch.randint(1000, (options.batch_size,)))
            for _ in range(options.batches)
        ]
        if device.type == "cuda":
            batches = [(pixels.pin_memory(), labels.pin_memory()) for pixels, labels in batches]
        passes = variants(options, Images(batches, processes.world), processes, device)
        seconds = _timed(options, {name: run for name, (_, run) in passes.items()}, processes, device)
        if not processes.is_main:
            return
        plain = {stage: name for name, (stage, _) in passes.items() if name.startswith("plain")}
        images = options.batch_size * options.batches * processes.world
        for name, times in seconds.items():
            ratios = [mine / own for mine, own in zip(seconds[plain[passes[name][0]]], times, strict=True)]
            print(json.dumps({
                "variant": name,
                "images_per_second": round(images / stats.median(times), 1),
                "times_plain": round(stats.median(ratios), 3),
            }))  # fmt: skip
        print(json.dumps(_conditions(options, processes, device)))


def _timed(
    options: Options, passes: dict[str, Callable[[], Any]], processes: Processes, device: torch.device
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(options.rounds + 1):
        # The plain loops are float32 in full; ours may use TF32, which is what --matmul_precision high means.
        for name, run in passes.items():
            set_matmul_precision("highest" if name.startswith("plain") else "high")
            processes.barrier()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 1:
                times[name].append(time.perf_counter() - start)
    return times


def _conditions(options: Options, processes: Processes, device: torch.device) -> dict[str, Any]:
    return {
        "model": options.model_name,
        "batch": options.batch_size,
        "processes": processes.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
