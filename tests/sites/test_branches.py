"""Branches that go as a whole: found where they return what the consumer does, replaced by their mean, saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

from vbp import (
    InputError,
    PruningPlan,
    Statistics,
    collect_statistics,
    count_parameters,
    find_sites,
    load_pruned,
    plan_cost,
    prune_,
    save_pruned,
)
from vbp.cost.widths import WidthCosts
from vbp.deploy.native import save_native
from vbp.method.sampling import RandomProbes
from vbp.models.classifier import ModelSource
from vbp.pruning.competition import unit_savings
from vbp.pruning.divergence import DenseReference
from vbp.pruning.make_plan import shared_plan
from vbp.pruning.plan import SitePlan
from vbp.pruning.site_errors import erring_units, errors_added
from vbp.refit.refits import refit_
from vbp.runtime.forward import logits_of
from vbp.sites.branches import ConstantBranch
from vbp.sites.site import Site, units_of

Setting = tuple[nn.Module, tuple[Site, ...], Statistics, Tensor]


def setting(name: str, images: int = 8) -> Setting:
    """Return a float64 model, all of its sites, all statistics, and images."""
    family = FAMILIES[name]
    model, pixels = randomise_(family.build()).double().eval(), family.example(images)
    sites = find_sites(model, pixels[:1], attention="conv" not in name)
    statistics = collect_statistics(model, sites, pixels.split(4), covariance=True, sensitivity=RandomProbes())
    return model, sites, statistics, pixels


def without(sites: tuple[Site, ...], gone: tuple[Site, ...]) -> PruningPlan:
    """Return the plan that removes some branches, and nothing else."""
    entries = (SitePlan(site, () if site in gone else tuple(range(site.hidden))) for site in sites)
    return PruningPlan(tuple(entries), 1.0, "global")


@pytest.mark.parametrize("name", ["timm-vit", "timm-deit", "timm-swin"])
def test_attentions_and_mlps_are_branches(name: str) -> None:
    _, sites, _, _ = setting(name, images=4)
    assert {site.branch.rpartition(".")[2] for site in sites} == {"attn", "mlp"}
    for unit in units_of(sites):
        assert len({site.branch for site in unit}) == 1
        assert unit[0].consumer.startswith(f"{unit[0].branch}.")


class Twice(nn.Module):
    """An MLP whose module adds what it reads to what its consumer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        return x + self.layers(x)


def test_a_module_that_does_more_is_no_branch() -> None:
    model = nn.Sequential(Twice(), nn.Linear(8, 3)).eval()
    (site,) = find_sites(model, torch.randn(2, 8))
    assert site.branch == "0.layers"

    class Own(Twice):
        def forward(self, x: Tensor) -> Tensor:
            first, activation, last = self.layers
            return x + last(activation(first(x)))

    (site,) = find_sites(nn.Sequential(Own(), nn.Linear(8, 3)).eval(), torch.randn(2, 8))
    assert site.branch == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("timm-vit", kind) for kind in ("mlp", "value")),
        *(("timm-swin", kind) for kind in ("mlp", "value")),
        ("timm-convnext-conv", "mlp"),
        ("timm-convnext-linear", "mlp"),
    ],
)
def test_a_branch_that_is_gone_is_its_mean(name: str, kind: str, tmp_path: Path) -> None:
    model, sites, statistics, images = setting(name)
    gone = next(unit for unit in units_of(sites) if unit[0].kind == kind)
    plan = without(sites, gone)
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means, statistics.covariances)
    assert isinstance(pruned.get_submodule(gone[0].branch), ConstantBranch)
    # The oracle: the consumer of the dense model reads the means everywhere.
    held, consumer = copy.deepcopy(model), gone[0].consumer
    mean = statistics.means[gone[0].name]

    def hold(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
        return mean.view(shape).expand_as(args[0])

    held.get_submodule(consumer).register_forward_pre_hook(hold)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(pruned(images)), logits_of(held(images)), rtol=0, atol=1e-10)
        with errors_added(model, pruned, plan, torch.ones(len(erring_units(plan)), dtype=torch.float64)):
            torch.testing.assert_close(logits_of(model(images)), logits_of(pruned(images)), rtol=0, atol=1e-10)
    cost, widths = plan_cost(model, plan, images[:1]), WidthCosts.of(model, sites, images[:1])
    assert cost.params[1] == count_parameters(pruned) <= widths.params_of(plan)
    assert cost.macs[1] <= widths.macs_of(plan) < cost.macs[0]
    save_pruned(pruned, tmp_path / "pruned", plans=plan)
    loaded = load_pruned(tmp_path / "pruned", copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(logits_of(loaded(images)), logits_of(pruned(images)))


def test_without_means_the_bias_is_left() -> None:
    model, sites, _, images = setting("timm-vit")
    gone = next(unit for unit in units_of(sites) if unit[0].kind == "mlp")
    bias = model.get_parameter(f"{gone[0].consumer}.bias").detach().clone()
    prune_(model, without(sites, gone))
    constant = model.get_submodule(gone[0].branch)
    assert isinstance(constant, ConstantBranch)
    assert torch.equal(constant.value, bias)
    assert logits_of(model(images)).isfinite().all()


def test_training_gives_all_layers_a_gradient() -> None:
    model, sites, statistics, images = setting("timm-vit")
    gone = next(unit for unit in units_of(sites) if unit[0].kind == "value")
    prune_(model, without(sites, gone), statistics.means)
    logits_of(model.train()(images)).sum().backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []
    constant = model.get_submodule(gone[0].branch)
    assert float(constant.value.grad.abs().sum()) > 0


def test_a_dead_branch_is_the_first_to_go() -> None:
    """An attention that returns a constant costs nothing: the plan removes it, and loses nothing."""
    from vbp.cost.budget import Budget
    from vbp.cost.target import BudgetTarget
    from vbp.pruning.auto import AutoSearch
    from vbp.pruning.make_plan import PlanRules
    from vbp.statistics.images import GivenImages

    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().eval(), family.example(8)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.zero_()
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images], covariance=True, sensitivity=RandomProbes())
    rules = PlanRules(attn_shared=True)
    target = BudgetTarget.of(Budget.of(target_macs=0.85), model, sites, images[:1], rules)
    search = AutoSearch(model, sites, statistics, GivenImages([images]), rules, savings=target.savings())
    choice = search.plan_of_size(lambda plan_for: target.proposal(plan_for, compensated=True), "85 %")
    kept = choice.plan.widths
    assert kept["blocks.1.attn.proj"][0] == kept["blocks.1.attn.qkv"][0] == 0
    pruned = copy.deepcopy(model)
    prune_(pruned, choice.plan, choice.means, choice.covariances)
    assert isinstance(pruned.blocks[1].attn, ConstantBranch)
    report = refit_(pruned, model, sites, [images])
    assert report.producers is not None
    assert DenseReference(model, [images]).divergence(pruned) < 0.1


def test_a_floor_that_was_raised_keeps_every_branch() -> None:
    _, sites, _, _ = setting("timm-vit", images=4)
    savings = unit_savings(sites, {site.name: 1.0 for site in sites})
    scores = {
        unit[0].name: torch.zeros(unit[0].hidden // unit[0].heads, dtype=torch.float64) for unit in units_of(sites)
    }
    lowest = shared_plan(sites, scores, savings, share=0.05)
    assert any(not entry.keep for entry in lowest.sites)
    raised = shared_plan(sites, scores, savings, share=0.25, min_keep_ratio=0.25)
    assert all(len(entry.keep) >= 0.25 * entry.site.hidden for entry in raised.sites)


def test_a_plan_that_removes_another_module_is_refused() -> None:
    from dataclasses import replace

    _, sites, _, _ = setting("timm-vit", images=4)
    gone = next(site for site in sites if site.kind == "mlp")
    plan = without((replace(gone, branch="head"),), (replace(gone, branch="head"),))
    with pytest.raises(InputError, match=r"removes head, which must hold blocks\.0\.mlp\.fc2"):
        PruningPlan.from_dict(plan.to_dict())


def test_no_configuration_says_that_a_branch_is_gone(tmp_path: Path) -> None:
    family = FAMILIES["timm-vit"]
    model = family.build().eval()
    sites = find_sites(model, family.example(1).float())
    plan = without(sites, sites[:1])
    prune_(model, plan)
    with pytest.raises(InputError, match=r"no configuration of .* can say"):
        save_native(model, tmp_path / "native", plans=plan, source=ModelSource("timm", "vit_tiny_patch16_224", {}))
