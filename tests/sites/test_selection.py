"""Sites chosen by name: what a pattern takes, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from families import FAMILIES

from vbp import InputError, PruningPlan, Site, inspect_model
from vbp.pruning.make_plan import PlanRules
from vbp.sites.selection import select_sites

SITES = tuple(Site((f"blocks.{i}.mlp.fc1",), f"blocks.{i}.mlp.fc2", 8) for i in range(12))
ATTENTION = (
    *SITES[:1],
    Site(("blocks.0.attn.qkv",), "blocks.0.attn.proj", 8, "value", (16,)),
    Site(("blocks.0.attn.qkv",) * 2, "", 8, "query_key", (0, 8)),
)


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ((), (), range(12)),
        (("blocks.0.*",), (), [0]),
        (("blocks.[0-2].*", "blocks.11.mlp.fc1"), (), [0, 1, 2, 11]),
        ((), ("blocks.1*",), [0, *range(2, 10)]),
        (("blocks.?.*",), ("blocks.[!0].*",), [0]),
    ],
)
def test_patterns_are_those_of_file_names(
    include: Sequence[str], exclude: Sequence[str], left: Sequence[int]
) -> None:
    assert select_sites(SITES, include, exclude) == tuple(SITES[place] for place in left)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["block.0.*"], [], r"include must match the name of a site, got 'block\.0\.\*'; the sites are blocks\.0"),
        ([], ["*", "x"], "exclude must match the name of a site, got 'x'"),
        (["*.fc1"], ["blocks.*"], r"must leave a site, got \*\.fc1 without blocks\.\*; exclude less"),
    ],
)
def test_patterns_that_say_nothing_are_refused(include: list[str], exclude: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_sites(SITES, include, exclude)


def test_an_attention_is_pruned_whole_or_not_at_all() -> None:
    assert select_sites(ATTENTION, ["*.attn.*"]) == ATTENTION[1:]
    with pytest.raises(InputError, match=r"got blocks\.0\.attn\.proj without blocks\.0\.attn\.qkv; name both"):
        select_sites(ATTENTION, exclude=["*.qkv"])


def test_patterns_stand_in_the_plan_and_in_an_inspection() -> None:
    family = FAMILIES["timm-vit"]
    model, image = family.build().eval(), family.example(1, torch.float32)
    every = inspect_model(model, image)
    assert all(site.selected for site in every.sites)
    found = inspect_model(model, image, exclude=["blocks.0.*"])
    assert [site.selected for site in found.sites] == [not site.name.startswith("blocks.0.") for site in every.sites]
    assert found.to_dict()["exclude"] == ["blocks.0.*"]
    table = found.table().splitlines()
    assert table[0].endswith("; include all, exclude blocks.0.*")
    assert "left out" in table[2]
    assert table[-1].startswith("selected sites")
    assert not every.table().splitlines()[-1].startswith("selected")
    rules = PlanRules(exclude=("blocks.0.*",))
    plan = rules.neutral(SITES[1:], 0.5)
    assert PruningPlan.from_dict(plan.to_dict()).exclude == ("blocks.0.*",)
    older = {name: value for name, value in plan.to_dict().items() if name not in ("include", "exclude")}
    assert PruningPlan.from_dict({**older, "format": "vbp-plan/1"}).exclude == ()
    applied = inspect_model(model, image, plans=PlanRules(include=("blocks.1.*",)).neutral(SITES[1:2], 1.0))
    assert (applied.include, [site.name for site in applied.sites if site.selected]) == (
        ("blocks.1.*",), ["blocks.1.mlp.fc1", "blocks.1.attn.proj", "blocks.1.attn.qkv"],
    )  # fmt: skip
