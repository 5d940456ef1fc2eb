"""What is left of a convolutional network right after pruning to a budget of MACs, without training.

    python benchmarks/convolutions.py --data imagenet_mini --checkpoint tf_efficientnet_lite0.safetensors

The paper's rule (variance, mean shift), `elimination` and `auto` (both with the refit), channels ranked by their
scores and by their scores over the MACs that they save. Every row is pruned from the dense model to the same share of
its MACs. Prints a Markdown table of top-1 relative to the dense model's and mean KL(dense || pruned): with the
BatchNorms as they are, with what `--batchnorm auto` makes of them, and for `auto` after all refits of a run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import tyro
from torch import Tensor, nn
from training_free import Dense, Setting

import vbp
from vbp.cost.target import BudgetTarget
from vbp.cost.timing import hardware
from vbp.method.sampling import RandomProbes, TokenSample
from vbp.pruning.auto import AutoSearch
from vbp.pruning.competition import per_saving
from vbp.pruning.criteria import criterion_scores
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import PlanChoice
from vbp.recipes.options import COVARIANCE_TOKENS
from vbp.refit.refits import Refits
from vbp.runtime.precision import move_
from vbp.statistics.evidence import Evidence
from vbp.statistics.images import GivenImages

Rule = Literal["paper", "elimination", "auto"]
RULES = PlanRules()


@dataclass(frozen=True)
class Options(Setting):
    """Compare rules on a convolutional network."""

    model_name: str = "tf_efficientnet_lite0"
    """A timm model."""
    shares: tuple[float, ...] = (0.8, 0.74, 0.65, 0.5)
    """Shares of the dense model's MACs."""
    rules: tuple[Rule, ...] = get_args(Rule)
    """What to compare."""
    limit_val: int = 0
    """Validation images, balanced over the classes; 0 takes all."""


class Bench(Dense):
    """The dense model, its statistics, and what rules need of them."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options
        self.val = vbp.balanced_subset(self.val, options.limit_val, 0)
        self.device = next(self.model.parameters()).device
        move_(self.model, self.device)
        self.example = self.classifier.example_input().to(self.device)
        self.sites = vbp.find_sites(self.model, self.example, convolutions=True)
        train = self.read(vbp.balanced_subset(self.images("train"), options.calibration, 0))
        self.pixels = GivenImages([pixels for pixels, _ in train])
        self.statistics = vbp.collect_statistics(
            self.model, self.sites, self.pixels.batches,
            covariance=True, tokens=TokenSample(COVARIANCE_TOKENS), sensitivity=RandomProbes(),
        )  # fmt: skip
        known = self.model, self.sites, self.example, self.pixels
        self.norms = Refits(*known, producers="off", stream="off", head="off", batchnorm="auto")
        self.refits = Refits(*known, batchnorm="auto")

    def choose(self, rule: Rule, share: float, *, cost_aware: bool) -> PlanChoice:
        """Plan the share of the MACs by a rule."""
        budget = vbp.Budget.of(target_macs=share)
        target = BudgetTarget.of(budget, self.model, self.sites, self.example, RULES)
        savings = target.savings() if cost_aware else {}
        size = partial(target.proposal, compensated=True)
        if rule == "auto":
            search = AutoSearch(self.model, self.sites, self.statistics, self.pixels, RULES, savings=savings)
            return search.plan_of_size(size, f"{share:.0%} of the MACs")
        criterion = "variance" if rule == "paper" else rule
        scores = criterion_scores(criterion, self.model, self.sites, Evidence(self.statistics))
        ranked: Mapping[str, Tensor] = per_saving(scores, savings)
        plan = size(lambda keep_ratio: RULES.plan(self.sites, ranked, keep_ratio))
        choice = PlanChoice(plan, self.statistics.means, self.statistics.covariances)
        return choice.compensated_by("mean" if rule == "paper" else "refit")

    def row(self, rule: Rule, share: float, *, cost_aware: bool) -> list[str]:
        """Prune, judge, and return the cells."""
        start = time.perf_counter()
        choice = self.choose(rule, share, cost_aware=cost_aware)
        pruned = copy.deepcopy(self.model)
        vbp.prune_(pruned, choice.plan, choice.means, choice.covariances)
        cells = [f"{share:.0%}", rule, "yes" if cost_aware else "no", f"{choice.plan.kept / choice.plan.total:.3f}"]
        cells.append(self.cell(pruned))
        again = copy.deepcopy(pruned)
        done = self.norms.refit_(again, plan=choice.plan).batchnorm
        cells.append(f"{self.cell(again)}, {done.chosen}" if done else "no BatchNorm")
        if rule != "auto":
            cells.append("")
        else:
            self.refits.refit_(pruned, plan=choice.plan)
            cells.append(self.cell(pruned))
        return [*cells, f"{time.perf_counter() - start:.0f}"]

    def cell(self, model: nn.Module) -> str:
        """Return relative top-1 and divergence."""
        verdict = self.judge(model)
        return f"{verdict.relative:.3f} ({verdict.divergence:.3f})"


def main(options: Options) -> None:
    """Print the table, a row as soon as it is known."""
    bench = Bench(options)
    print(f"{options.model_name}, {hardware(bench.device)}: dense top-1 {100 * bench.judge.accuracy:.2f} %")
    head = ("MACs", "rule", "cost-aware", "channels", "as they are", "batchnorm auto", "all refits", "s")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for share in options.shares:
        for rule in options.rules:
            for cost_aware in (False, True):
                print(f"| {' | '.join(bench.row(rule, share, cost_aware=cost_aware))} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
