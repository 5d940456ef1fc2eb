"""Take the smallest model of every image family through finding, pruning, checking, saving and refitting.

    python benchmarks/family_coverage.py --output coverage.md

Random weights, float64, a CPU without network; of the transformers of transformers that are stacks of many layers,
and of the largest of timm, two layers are taken. Each model has a process of its own, with limits of time and memory:
what one does harms no other. A line says for each step `ok`, what was refused and why, or an error:

- *1x1*, *all*: sites that are found, and the share of the MACs of the layers at them, without and with
  `--convolutions`; the steps that follow have the sites of the second, all of them and at keep ratio 0.65;
- *prune*: statistics, plan by variance, mean shift, and the MACs that `plan_cost` promised;
- *oracle*: with the exact sites alone the outputs are those of the dense model whose removed channels are held at
  their means, as each layer that reads them sees them (1e-6 of their size); *inexact* where there is none, for all
  kernels meet zero padding;
- *backward*: every parameter that had a gradient has one;
- *load*: a saved model comes back bit-equal;
- *refit*: of up to eight sites, from the first to the last: covariances, refit of the sites, BatchNorms, kernels,
  producers, and stream, with finite outputs.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import torch
import tyro
from family_models import Library, images, members, runnable, smallest
from torch import Tensor, nn

import vbp
from vbp.cost.macs import macs_by_module
from vbp.cost.timing import hardware
from vbp.errors import first_line
from vbp.refit.refits import Refits
from vbp.runtime.forward import call_values, hooked, logits_of
from vbp.sites.layers import channel_dim
from vbp.statistics.images import GivenImages

KEEP_RATIO = 0.65
STEPS = ("find", "prune", "oracle", "backward", "load", "refit")
MEMORY = 14 * 2**30
# What the process imports once from which those of the models are forked.
PRELOADED = ("torch", "torchvision", "timm", "transformers", "tyro", "vbp")


@dataclass(frozen=True)
class Options:
    """Check the smallest model of every family and write a table."""

    output: Path = Path("coverage.md")
    """The file to write; beside it lie the results by model, one JSON line each, which are not made again."""
    libraries: tuple[Library, ...] = get_args(Library)
    """Whose models."""
    families: tuple[str, ...] = ()
    """Parts of the names of families; by default all."""
    limit: float = 300
    """Seconds that a model may take."""
    jobs: int = 2
    """Models at the same time, with one thread each."""
    one: str = ""
    """Check this model alone, `library:name`, and print its result as JSON."""


@dataclass(frozen=True)
class Result:
    """What came of a model: sites and share of the MACs by kernels that were looked at, and each step's outcome."""

    library: str
    family: str
    name: str
    size: int
    pointwise: str
    sites: str
    steps: dict[str, str]
    seconds: float

    @property
    def verdict(self) -> str:
        """Return `works`, `refused` or `error`."""
        outcomes = list(self.steps.values())
        if any(one.startswith("error") for one in outcomes):
            return "error"
        return "refused" if any(one.startswith("refused") for one in outcomes) else "works"


def main(options: Options) -> None:
    """Check one model, or all in processes of their own."""
    if options.one:
        library, _, name = options.one.partition(":")
        print(json.dumps(asdict(check(library, name))))
        return
    records = options.output.with_suffix(".jsonl")
    results = [Result(**json.loads(line)) for line in records.read_text().splitlines()] if records.exists() else []
    known = {(result.library, result.family) for result in results}
    parts = options.families or ("",)
    every = [(library, family) for library in options.libraries for family in members(library)]
    asked = [one for one in every if one not in known and any(part in one[1] for part in parts)]
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(in_process, *family, options.limit) for family in asked]
        try:
            for done in as_completed(waiting):
                result = done.result()
                results.append(result)
                with records.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                print(result.library, result.family, result.name, result.verdict, result.steps, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    options.output.write_text(table(results), encoding="utf-8")


def table(results: Iterable[Result]) -> str:
    """Return the counts and a line for each model, as Markdown."""
    results = list(results)
    counts = Counter(result.verdict for result in results)
    head = ("Family", "Library", "Model", "Pixels", "Sites 1x1", "Sites all", *STEPS, "Seconds")
    rows = [
        (
            *(result.family, result.library, f"`{result.name}`", str(result.size), result.pointwise, result.sites),
            *(result.steps.get(step, "").replace("|", "/") for step in STEPS),
            f"{result.seconds:.0f}",
        )
        for result in sorted(results, key=lambda result: (result.library, result.family))
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    command = f"`{' '.join(['python', *sys.argv])}`, {hardware(torch.device('cpu'))}, {datetime.now(UTC):%Y-%m-%d}"
    told = f"{len(results)} models: {counts['works']} work, {counts['refused']} are refused, {counts['error']} err."
    return f"# Coverage\n\n{command}\n\n{told}\n\n" + "\n".join(lines) + "\n"


def in_process(library: str, family: str, limit: float) -> Result:
    """Check a family's smallest model in a process of its own; no result within `limit` seconds is an error."""
    start = time.monotonic()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(PRELOADED))
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_send, args=(sender, library, family))
    process.start()
    sender.close()
    outcome = f"error: not done in {limit:g} s"
    try:
        if receiver.poll(limit):
            return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        process.join()
        outcome = f"error: the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return Result(library, family, "", 0, "", "", {"find": outcome}, time.monotonic() - start)


def _send(sender: Connection, library: str, family: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    name = smallest(library, family)
    sender.send(replace(check(library, name), family=family))


def check(library: str, name: str) -> Result:
    """Take one model through all steps."""
    start, steps = time.monotonic(), dict[str, str]()
    try:
        size, make = runnable(library, name)
        model = make()
    except Exception as error:  # noqa: BLE001 (any library's)
        return Result(library, name, name, 0, "", "", {"find": _told(error)}, time.monotonic() - start)
    example = images(1, size)
    pointwise, _ = _found(model, example, convolutions=False)
    told, sites = _found(model, example, convolutions=True)
    steps["find"] = told if isinstance(sites, str) else "ok"
    if not isinstance(sites, str):
        case = Case(model, make, sites, images(4, size))
        for step in STEPS[1:]:
            with _noting(steps, step):
                getattr(case, step)()
    return Result(library, name, name, size, pointwise, told, steps, time.monotonic() - start)


class _InexactError(Exception):
    """No site has an exact mean shift."""


@contextmanager
def _noting(steps: dict[str, str], step: str) -> Iterator[None]:
    try:
        yield
    except _InexactError:
        steps[step] = "inexact"
    except Exception as error:  # noqa: BLE001 (the table tells it)
        steps[step] = _told(error)
    else:
        steps[step] = "ok"


def _told(error: Exception) -> str:
    if isinstance(error, (vbp.InputError, ImportError)):
        return f"refused: {first_line(error)[:300]}"
    return f"error: {type(error).__name__}: {first_line(error)[:200]}"


def _found(model: nn.Module, example: Tensor, *, convolutions: bool) -> tuple[str, tuple[vbp.Site, ...] | str]:
    """Return the number of sites with their share of the MACs, and the sites; or why there is none, twice."""
    try:
        sites = vbp.find_sites(model, example, convolutions=convolutions)
        macs = macs_by_module(model, example)
    except Exception as error:  # noqa: BLE001 (the table tells it)
        return _told(error), _told(error)
    layers = {layer for site in sites for layer in (*site.layers, *site.inner)}
    share = sum(macs.get(layer, 0) for layer in layers) / max(1, macs[""])
    return f"{len(sites)} ({share:.0%})", sites


@dataclass(frozen=True)
class Case:
    """A dense model, how a fresh one is built, its sites, and images; each method is a step that may raise."""

    model: nn.Module
    make: Callable[[], nn.Module]
    sites: tuple[vbp.Site, ...]
    pixels: Tensor

    def _pruned(self, sites: tuple[vbp.Site, ...]) -> tuple[nn.Module, vbp.PruningPlan, vbp.Statistics]:
        statistics = vbp.collect_statistics(self.model, sites, [self.pixels])
        plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=KEEP_RATIO)
        pruned = copy.deepcopy(self.model)
        vbp.prune_(pruned, plan, statistics.means)
        return pruned, plan, statistics

    def prune(self) -> None:
        """Prune all sites; the MACs are those that were promised."""
        pruned, plan, _ = self._pruned(self.sites)
        promised = vbp.plan_cost(self.model, plan, self.pixels[:1]).macs[1]
        counted = vbp.count_macs(pruned, self.pixels[:1])
        _expect(promised == counted, f"{counted} MACs are left, {promised} were promised")

    def oracle(self) -> None:
        """Compare with the dense model whose removed channels are held at their means."""
        exact = tuple(site for site in self.sites if site.exact)
        if not exact:
            raise _InexactError
        pruned, plan, statistics = self._pruned(exact)
        with torch.no_grad():
            found = logits_of(pruned(self.pixels))
            with hooked(before=list(_clamps(self.model, plan, statistics))):
                wanted = logits_of(self.model(self.pixels))
        off = float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))
        _expect(off < 1e-6, f"outputs are off by {off:.2g}")

    def backward(self) -> None:
        """Check that every parameter has a gradient that has one in the dense model."""
        pruned, _, _ = self._pruned(self.sites)
        names = []
        for model in (self.model, pruned):
            logits_of(model(self.pixels)).square().sum().backward()  # type: ignore[no-untyped-call]
            names.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
            model.zero_grad(set_to_none=True)
        _expect(names[0] <= names[1], f"no gradient in {sorted(names[0] - names[1])[:3]}")

    def load(self) -> None:
        """Save and load."""
        pruned, plan, _ = self._pruned(self.sites)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            vbp.save_pruned(pruned, Path(folder) / "model.pth", plans=plan)
            loaded = vbp.load_pruned(Path(folder) / "model.pth", model=self.make())
            same = torch.equal(logits_of(loaded(self.pixels)), logits_of(pruned(self.pixels)))
        _expect(same, "the loaded model returns something else")

    def refit(self) -> None:
        """Prune some sites with covariances, then refit what can be."""
        sites = self.sites[:: -(-len(self.sites) // 8)]
        statistics = vbp.collect_statistics(self.model, sites, [self.pixels], covariance=True)
        plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=KEEP_RATIO)
        pruned = copy.deepcopy(self.model)
        vbp.prune_(pruned, plan, statistics.means, statistics.covariances)
        known = self.model, sites, self.pixels[:1], GivenImages([self.pixels])
        Refits(*known, head="off", batchnorm="auto").refit_(pruned, plan=plan)
        with torch.no_grad():
            _expect(bool(logits_of(pruned(self.pixels)).isfinite().all()), "outputs are not finite")


def _expect(condition: bool, fault: str) -> None:
    if not condition:
        raise RuntimeError(fault)


def _clamps(
    model: nn.Module, plan: vbp.PruningPlan, statistics: vbp.Statistics
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Return hooks that hold the removed channels at their means where layers read them."""
    for entry, reader in [(one, reader) for one in plan.sites for reader in one.site.readers]:
        columns = torch.tensor([reader.first + channel for channel in entry.removed], dtype=torch.long)
        means = statistics.means[reader.key][list(entry.removed)]

        def clamp(
            layer: nn.Module, args: tuple[Any, ...], kwargs: Any, columns: Tensor = columns, means: Tensor = means
        ) -> Any:
            values = call_values(args, kwargs)[0].clone().movedim(channel_dim(layer), -1)
            values[..., columns] = means.to(values)
            return (values.movedim(-1, channel_dim(layer)),), {}

        yield model.get_submodule(reader.layer), clamp


if __name__ == "__main__":
    main(tyro.cli(Options))
