"""Files of the library can be named by strings, as everywhere else in Python."""

from pathlib import Path

import torch

from vbp import PruningPlan, Statistics, collect_statistics, find_sites, load_classifier, make_plan, variance_scores


def test_checkpoints_statistics_and_plans_are_found_by_strings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, kept, plans = (str(tmp_path / name) for name in ("w.pth", "statistics.safetensors", "plan.json"))
    torch.save(load_classifier("test_vit", allow_random_init=True).model.state_dict(), weights)
    classifier = load_classifier("test_vit", checkpoint=weights)
    images = torch.randn(2, *classifier.example_input().shape[1:])
    sites = find_sites(classifier.model, images[:1])
    statistics = collect_statistics(classifier.model, sites, [images])
    statistics.save(kept)
    loaded = Statistics.load(kept)
    assert all(torch.equal(loaded.means[name], mean) for name, mean in statistics.means.items())
    plan = make_plan(sites, variance_scores(loaded), keep_ratio=0.5)
    plan.save(plans)
    assert PruningPlan.load(plans) == plan
