"""What each choice of the training-free method is worth: one choice at a time, all else as by default.

    python benchmarks/ablation.py --data ../imagenet --checkpoint deit_tiny.safetensors --output ablation.md

One pass over the calibration images collects all that any row needs: moments before and after the activation,
covariances of several shares of the tokens, sensitivities, gradients on labels; parts of it give the rows with fewer
images. Every model is pruned from the dense one and evaluated once on all validation images. Prints a Markdown table:
top-1 relative to the dense model's, with the mean KL(dense || pruned).
"""

from __future__ import annotations

import copy
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

import timm
import torch
import tyro
from torch import Tensor, nn
from training_free import Dense, Setting

import vbp
from vbp.data.images import balanced_order
from vbp.method.elimination import Elimination, strictly_rising
from vbp.method.ridge import RIDGE
from vbp.method.sampling import RandomProbes, TokenSample, TokenSampler
from vbp.pruning.auto import sensitivity_eliminations
from vbp.pruning.criteria import criterion_scores, eliminations
from vbp.pruning.plan import PlanChoice
from vbp.recipes.options import COVARIANCE_TOKENS
from vbp.refit.refits import Refit, Refits
from vbp.runtime.forward import hooked
from vbp.runtime.processes import Processes
from vbp.statistics.collect import Observer, rows_of
from vbp.statistics.evidence import Evidence
from vbp.statistics.gradients import GradientSum
from vbp.statistics.images import GivenImages
from vbp.statistics.statistics import Statistics

Scores = dict[str, Tensor]
_BASELINES = ("random", "l2", "taylor", "variance", "output_variance", "elimination")


@dataclass(frozen=True)
class Options(Setting):
    """Vary one choice of the training-free method at a time."""

    ratios: tuple[float, ...] = (0.65, 0.5)
    """Shares of the hidden channels to keep."""
    groups: tuple[str, ...] = ("statistics", "compensation", "criterion", "budget", "images", "tokens", "ridge")
    """Choices to vary."""
    auto: Literal["too", "only", "off"] = "too"
    """Whether to make the rows of auto, which take minutes each."""
    images: tuple[int, ...] = (64, 128, 256, 512)
    """Numbers of calibration images besides all."""
    auto_images: tuple[int, ...] = (128,)
    """Those of them for auto."""
    covariance_tokens: float = COVARIANCE_TOKENS
    """Share of the tokens for the covariance, where it is not what varies."""
    tokens: tuple[float, ...] = (0.02, 0.1, 0.2, 1.0)
    """Shares of the tokens."""
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Ridges."""
    output: Path | None = None
    """Write the table here, too."""


class Collected:
    """All that one pass over the calibration images tells, and the rows asked for need."""

    def __init__(self, dense: Dense, options: Options) -> None:
        train = dense.images("train")
        chosen = train.select(balanced_order(train, 0)[: options.calibration])
        self.pixels, self._labels = (torch.cat(part) for part in zip(*dense.read(chosen), strict=True))
        self._dense, self._options, self._groups = dense, options, set(options.groups)
        plain = options.auto != "only"
        self._gradients = GradientSum(dense.model, dense.sites) if plain and "criterion" in self._groups else None
        shares = options.tokens if plain and "tokens" in self._groups else ()
        self._samplers = {
            share: TokenSampler(TokenSample(share)) for share in shares if share != options.covariance_tokens
        }
        with self._watching_more() as (before, more):
            self.by_images: dict[int, Statistics] = self._passes()
        self.all = self.by_images[len(self.pixels)]
        self.gradients = None if self._gradients is None else self._gradients.mean(Processes())
        # What the moments are called does not tell where they were taken: the library knows none of these.
        self.before = replace(self.all, moments={name: one.moments for name, one in before.items()})  # type: ignore[misc]
        self.by_tokens = {options.covariance_tokens: self.all} | {
            share: replace(self.all, covariances={name: one.covariance.finish() for name, one in found.items()})  # type: ignore[union-attr, misc]
            for share, found in more.items()
        }

    @contextmanager
    def _watching_more(self) -> Iterator[tuple[dict[str, Observer], dict[float, dict[str, Observer]]]]:
        """See also what the producers return, and more shares of the tokens."""
        model, sites = self._dense.model, self._dense.sites
        before = {site.name: Observer() for site in sites}
        more = {share: {site.name: Observer(one) for site in sites} for share, one in self._samplers.items()}
        made = [
            (module, before[site.name].of_output(rows_of(module, places)))
            for site in sites
            for module, places in ((model.get_submodule(layer), places) for layer, places in site.places)
        ]
        read = [
            (model.get_submodule(site.consumer), observers[site.name].of_input)
            for observers in more.values()
            for site in sites
        ]
        with hooked(made, before=read):
            yield before, more

    def _passes(self) -> dict[int, Statistics]:
        """Read the images part by part, and merge."""
        model, sites, size = self._dense.model, self._dense.sites, self._options.batch_size
        sensed = self._options.auto != "off" and self._groups & {"criterion", "budget", "images"}
        pivots = vbp.collect_statistics(model, sites, torch.split(self.pixels[:32], size)).means
        found: dict[int, Statistics] = {}
        start = 0
        for stop in sorted({*(self._options.images if "images" in self._groups else ()), len(self.pixels)}):
            part = vbp.collect_statistics(
                model, sites, self._seen(start, stop), covariance=True,
                tokens=TokenSample(self._options.covariance_tokens, first=start),
                sensitivity=RandomProbes(first=start) if sensed else None, pivots=pivots,
            )  # fmt: skip
            found[stop] = found[start].merge(part) if start else part
            start = stop
        return found

    def _seen(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = self._options.batch_size
        batches = zip(
            torch.split(self.pixels[start:stop], size), torch.split(self._labels[start:stop], size), strict=True
        )
        for batch in batches if self._gradients is None else self._gradients.tee(batches):
            for sampler in self._samplers.values():
                sampler.begin(len(batch[1]))
            yield batch


@dataclass(frozen=True)
class Row:
    """A line of the table; rows of one key are one model."""

    group: str
    name: str
    key: str
    build: Callable[[float], nn.Module]


class Ablation:
    """Prunes copies of the dense model, one for each row and ratio."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.dense = Dense(options)
        start = time.perf_counter()
        self.seen = Collected(self.dense, options)
        _tell(f"one pass over the calibration images: {time.perf_counter() - start:.0f} s")
        # These are asked for once a ratio, and several rows share them.
        self.scores, self.orders, self.auto_orders = (
            cache(self._scores),
            cache(self._orders),
            cache(self._auto_orders),
        )
        self.auto_choices, self.reference = cache(self._auto_choice), cache(self._reference)
        model, sites, pixels = self.dense.model, self.dense.sites, self.seen.pixels
        self.refits = Refits(model, sites, pixels[:1], GivenImages(torch.split(pixels, options.batch_size)))

    def rows(self) -> list[Row]:
        """Return all rows of the groups asked for."""
        everyone = [
            *self._statistics(), *self._compensations(), *self._criteria(), *self._budgets(), *self._images(),
            *self._tokens(), *self._ridges(),
        ]  # fmt: skip
        return [
            row
            for row in everyone
            if row.group in self.options.groups
            and {"too": True, "only": row.key.startswith("auto"), "off": not row.key.startswith("auto")}[
                self.options.auto
            ]
        ]

    def _statistics(self) -> Iterable[Row]:
        after, before = self.seen.all, self.seen.before
        variances = vbp.variance_scores(before)
        yield Row("statistics", "variance and mean after the activation", "paper", self._paper)
        yield Row(
            "statistics", "variance before, mean after", "before, after",
            lambda ratio: self._pruned(variances, ratio, means=after.means),
        )  # fmt: skip
        yield Row(
            "statistics", "variance and mean before", "before, before",
            lambda ratio: self._pruned(variances, ratio, means=before.means),
        )  # fmt: skip

    def _compensations(self) -> Iterable[Row]:
        scores = vbp.variance_scores(self.seen.all)
        yield Row("compensation", "none", "none", lambda ratio: self._pruned(scores, ratio))
        yield Row("compensation", "mean", "paper", self._paper)
        yield Row("compensation", "refit", "variance", self._by("variance"))

    def _criteria(self) -> Iterable[Row]:
        for name in _BASELINES:
            yield Row("criterion", name, name, self._by(name))
        yield Row("criterion", "auto", "auto", self._auto("all"))
        with_ = self._auto_with
        yield Row("criterion", "auto, last layer", "auto, last layer", with_("head"))
        yield Row("criterion", "auto, producers", "auto, producers", with_("producers"))
        yield Row("criterion", "auto, producers, stream", "auto, two", with_("producers", "stream"))
        yield Row("criterion", "auto, all three", "auto, three", with_("producers", "stream", "head"))

    def _budgets(self) -> Iterable[Row]:
        def of(scores: Callable[[], Scores], scope: str = "global") -> Callable[[float], nn.Module]:
            return lambda ratio: self._refitted(self.seen.all, scores(), ratio, scope=scope)

        def own() -> Scores:
            return {name: order.scores for name, order in self.orders("all", RIDGE).items()}

        def dealt() -> Scores:
            """Deal variances out again within each site, in the order of elimination."""
            variances, found = vbp.variance_scores(self.seen.all), {}
            for name, one in self.orders("all", RIDGE).items():
                found[name] = torch.empty(len(one.order), dtype=torch.float64)
                found[name][one.order] = strictly_rising(variances[name].double().sort().values)
            return found

        yield Row("budget", "equal shares", "equal", of(own, "per_layer"))
        yield Row("budget", "counts of the global variance", "dealt", of(dealt))
        yield Row("budget", "counts of the output variance", "elimination", self._by("elimination"))
        yield Row("budget", "elimination's own costs", "own", of(own))
        yield Row("budget", "auto", "auto", self._auto("all"))

    def _images(self) -> Iterable[Row]:
        for images, found in self.seen.by_images.items():
            key = "elimination" if found is self.seen.all else f"elimination, {images}"
            yield Row("images", f"{images}, elimination", key, self._by("elimination", f"images {images}"))
        for images, found in self.seen.by_images.items():
            if images in self.options.auto_images or found is self.seen.all:
                key = "auto" if found is self.seen.all else f"auto, {images}"
                yield Row("images", f"{images}, auto", key, self._auto(f"images {images}"))

    def _tokens(self) -> Iterable[Row]:
        for share in self.options.tokens:
            key = "elimination" if share == self.options.covariance_tokens else f"elimination, tokens {share}"
            yield Row("tokens", f"{share:g}", key, self._by("elimination", f"tokens {share}"))

    def _ridges(self) -> Iterable[Row]:
        for ridge in self.options.ridges:
            key = "elimination" if ridge == RIDGE else f"elimination, ridge {ridge}"
            yield Row("ridge", f"{ridge:g}", key, self._by("elimination", ridge=ridge))

    def _found(self, what: str) -> Statistics:
        kind, _, number = what.partition(" ")
        if kind == "images":
            return self.seen.by_images[int(number)]
        return self.seen.by_tokens[float(number)] if kind == "tokens" else self.seen.all

    def _scores(self, criterion: str, what: str, ridge: float) -> Scores:
        evidence = Evidence(self._found(what), self.seen.gradients, ridge=ridge)
        return criterion_scores(criterion, self.dense.model, self.dense.sites, evidence)

    def _orders(self, what: str, ridge: float) -> Mapping[str, Elimination]:
        return eliminations(self.dense.model, self.dense.sites, self._found(what), ridge=ridge)

    def _paper(self, ratio: float) -> nn.Module:
        return self._pruned(vbp.variance_scores(self.seen.all), ratio, means=self.seen.all.means)

    def _by(self, criterion: str, what: str = "all", *, ridge: float = RIDGE) -> Callable[[float], nn.Module]:
        return lambda ratio: self._refitted(
            self._found(what), self.scores(criterion, what, ridge), ratio, ridge=ridge
        )

    def _auto_choice(self, what: str, ratio: float) -> PlanChoice:
        statistics = self._found(what)
        choice = vbp.auto_plan(
            self.dense.model, self.dense.sites, statistics, self.reference(statistics.images), keep_ratio=ratio,
            orders=self.auto_orders(what),
        )  # fmt: skip
        _tell(choice.table())
        return choice

    def _auto_orders(self, what: str) -> Mapping[str, Elimination]:
        return sensitivity_eliminations(self.dense.model, self.dense.sites, self._found(what))

    def _reference(self, images: int) -> vbp.DenseReference:
        """Take the first calibration images, no more than the statistics are of."""
        first = self.seen.pixels[: min(self.options.held_out, images)]
        return vbp.DenseReference(self.dense.model, torch.split(first, self.options.batch_size))

    def _auto(self, what: str) -> Callable[[float], nn.Module]:
        def build(ratio: float) -> nn.Module:
            choice = self.auto_choices(what, ratio)
            model = copy.deepcopy(self.dense.model)
            vbp.prune_(model, choice.plan, choice.means, choice.covariances)
            return model

        return build

    def _auto_with(self, *refits: Refit) -> Callable[[float], nn.Module]:
        def build(ratio: float) -> nn.Module:
            model = self._auto("all")(ratio)
            _tell(str(self.refits.refit_(model, refits)))
            return model

        return build

    def _refitted(
        self, found: Statistics, scores: Scores, ratio: float, *, scope: str = "global", ridge: float = RIDGE
    ) -> nn.Module:
        model = copy.deepcopy(self.dense.model)
        plan = vbp.make_plan(self.dense.sites, scores, keep_ratio=ratio, scope=scope)  # type: ignore[arg-type]
        vbp.prune_(model, plan, found.means, found.covariances, ridge=ridge)
        return model

    def _pruned(self, scores: Scores, ratio: float, means: Mapping[str, Tensor] | None = None) -> nn.Module:
        model = copy.deepcopy(self.dense.model)
        vbp.prune_(model, vbp.make_plan(self.dense.sites, scores, keep_ratio=ratio), means)
        return model


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(ablation: Ablation, options: Options) -> str:
    """Evaluate each distinct model once, and give the table."""
    cells: dict[tuple[str, float], str] = {}
    lines = [
        f"| choice | | {' | '.join(f'keep {ratio:g}' for ratio in options.ratios)} |",
        "|---|---|" + "---|" * len(options.ratios),
    ]
    for row in ablation.rows():
        for ratio in options.ratios:
            if (row.key, ratio) not in cells:
                start = time.perf_counter()
                found = ablation.dense.judge(row.build(ratio))
                cells[row.key, ratio] = f"{found.relative:.3f} ({found.divergence:.3f})"
                took = time.perf_counter() - start
                _tell(f"{row.group}: {row.name}, keep {ratio:g}: {cells[row.key, ratio]}, {took:.0f} s")
        lines.append(
            f"| {row.group} | {row.name} | {' | '.join(cells[row.key, ratio] for ratio in options.ratios)} |"
        )
    return "\n".join(lines)


def main(options: Options) -> None:
    """Print the table."""
    ablation = Ablation(options)
    judge = ablation.dense.judge
    setting = (
        f"{options.model_name}, {ablation.seen.all.images} calibration and {len(judge.labels)} validation images, "
        f"dense {100 * judge.accuracy:.2f} %; unless a row says otherwise all images, {options.covariance_tokens:g} "
        f"of their tokens, ridge {RIDGE:g}. {platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"{datetime.now(UTC).date()}."
    )
    text = f"{setting}\n\n{table(ablation, options)}\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
