"""One budget for MLPs and attention against MLPs alone, and attention alone, without training or labels: whole runs.

    python benchmarks/whole_block.py --data_path DATA --model_name deit_tiny_patch16_224 [--checkpoint FILE] \
        [--calib_samples 1000] [--targets 0.8 0.72 0.6 0.5] [--ranks 0.75 0.5] [--save_dir output/whole_block]

Each row is a `vbp run` in a folder of its own, whose `summary.json` is read where it is there already, so that a
benchmark that was stopped goes on. All of them read the statistics of the first that made some. With `--latency` the
pruned models are timed beside the dense one by PyTorch and ONNX Runtime, in one run for each number of threads and
batch size; with `--cost` the stages of one more run that reads no statistics are compared with a bare pass over its
images. `--views` and `--tune` take longer and keep more.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro

import vbp
from vbp.cli.latency import run_latency
from vbp.cli.options import LatencyConfig
from vbp.deploy.settings import Backend
from vbp.recipes.run import run
from vbp.recipes.setup import open_session, prepare
from vbp.report.run_report import STATISTICS
from vbp.runtime.tables import markdown_table

# What a fixed budget leaves to choose.
BOTH, MLPS = "MLPs and attention", "MLPs alone"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare one budget for MLPs and attention with MLPs alone."""

    data_path: str
    """Folder with train and val, each with one folder for each class."""
    model_name: str
    """A timm model, or as for vbp run."""
    checkpoint: Path | None = None
    """Its weights."""
    calib_samples: int = 1000
    """Calibration images."""
    targets: tuple[str, ...] = ("0.8", "0.72", "0.6", "0.5")
    """Shares of the MACs."""
    ranks: tuple[float, ...] = (0.75, 0.5)
    """Shares of every head that stay where attention alone is cut."""
    views: int = 1
    """Views of each image, for statistics and refits."""
    tune: str = "off"
    """As of vbp run: what is tuned without labels after it."""
    save_dir: Path = Path("output/whole_block")
    """Where the runs go."""
    latency: tuple[str, ...] = ()
    """Of these targets the pruned models are timed."""
    cost: bool = False
    """Compare the stages of a run with a bare pass over its images."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """The runs of one model, in folders of their own."""

    options: Options

    def row(self, label: str, **settings: Any) -> dict[str, Any]:
        """Return the summary of a run, which is made where there is none yet."""
        folder = self.options.save_dir / label
        if not (folder / "summary.json").is_file():
            # Not those of a run that was stopped here: the run that is to read them begins with an empty folder.
            made = sorted(set(self.options.save_dir.glob("both-*/statistics.safetensors")) - {folder / STATISTICS})
            again = settings.pop("reuse", True)
            given: dict[str, Any] = {"stats_path": made[0]} if made and again else {"calib_views": self.options.views}
            run(self._config(save_dir=folder, overwrite=True, **given, **settings))
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return summary

    def _config(self, **settings: Any) -> vbp.RunConfig:
        options = self.options
        return vbp.RunConfig(
            data_path=options.data_path, model_type="auto", model_name=options.model_name,
            checkpoint=options.checkpoint, calib_samples=options.calib_samples, epochs_ft=0, round_to=8,
            criterion="auto", compensation="refit", batchnorm="auto", num_workers=2, tune=options.tune,
            refit_views="auto" if options.views == 1 else options.views, **settings,
        )  # fmt: skip

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Run everything; yield what was cut, the target, and the summary."""
        for target in self.options.targets:
            yield BOTH, target, self.row(f"both-{target}", target_macs=target)
            yield MLPS, target, self.row(f"mlps-{target}", target_macs=target, attention="off")
        for rank in self.options.ranks:
            attention = {"keep_ratio": 1.0, "bottleneck": True, "attn_keep_ratio": rank}
            yield "attention alone", f"rank {rank:g}", self.row(f"attention-{rank:g}", **attention)

    def cost(self) -> str:
        """Return the seconds of each stage as multiples of a bare forward pass over the calibration images."""
        target = self.options.targets[0]
        summary = self.row(f"cost-{target}", target_macs=target, reuse=False)
        config = self._config(save_dir=self.options.save_dir / "bare", target_macs=target)
        with open_session(config) as session:
            job = prepare(config, session)
            places = range(len(job.calibration))
            start = time.perf_counter()
            with torch.no_grad():
                for pixels in job.calibration.pixels(places, "bare pass"):
                    job.dense(pixels)
            bare = time.perf_counter() - start
        stages = {name: second for name, second in summary["seconds"].items() if second >= 0.05 * bare}
        shares = ", ".join(f"{name} {second / bare:.1f}" for name, second in stages.items())
        return f"bare pass over {len(places)} images: {bare:.1f} s; in multiples of it: {shares}"

    def latency(self, target: str) -> Iterator[list[str]]:
        """Yield the speed-ups of the run's artefact, and what share of the MACs ratio they are."""
        self.row(f"both-{target}", target_macs=target)
        artifact = str(self.options.save_dir / f"both-{target}" / "artifact")
        backends: tuple[Backend, ...] = ("torch", "onnxruntime")
        for backend, threads in itertools.product(backends, (1, 2)):
            config = LatencyConfig(artifact, batch_sizes=(1, 32), backend=backend, threads=threads, device="cpu")
            report = run_latency(config)
            for row in report.rows:
                yield [
                    target, backend, str(threads), str(row.batch), row.speedup_text, f"{report.ideal:.2f}x",
                    f"{report.of_ideal(row):.2f}",
                ]  # fmt: skip


def main(options: Options) -> None:
    """Print the tables as Markdown."""
    bench = Bench(options)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    heading = [
        "what is cut",
        "target",
        "MACs",
        "MLP channels",
        "heads",
        "dense top-1",
        "pruned",
        "tuned",
        "share",
        "KL",
    ]
    cells = []
    for what, target, summary in bench.rows():
        base, pruned, tuned = summary["base"], summary["pruned"], summary.get("tuned")
        heads = "all" if summary["attention"] is None else f"{summary['attention']:.1%}"
        cells.append([
            what, target, f"{pruned['macs'] / base['macs']:.3f}", f"{summary['keep_ratio']:.1%}", heads,
            f"{base['top1']:.2f}", f"{pruned['top1']:.2f}", "-" if tuned is None else f"{tuned['top1']:.2f}",
            f"{(tuned or pruned)['top1'] / base['top1']:.3f}",
            f"{min(one['divergence'] for one in summary['candidates']):.4f}",
        ])  # fmt: skip
        print(f"| {' | '.join(cells[-1])} |", flush=True)
    print(markdown_table(heading, cells))
    rows = [row for target in bench.options.latency for row in bench.latency(target)]
    if rows:
        print(markdown_table(["target", "backend", "threads", "batch", "speed-up", "by MACs", "share of that"], rows))
    if bench.options.cost:
        print(bench.cost())


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
