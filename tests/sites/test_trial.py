"""Sites that the model's code does not allow to be narrower are left out one by one; the rest is offered."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbp import find_sites, make_plan, prune_


class Block(nn.Module):
    """An MLP whose code may hold its width."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        if self.kind == "reshape":
            hidden = hidden.reshape(-1, 3, 4).reshape(-1, 12)
        if self.kind == "split":
            first, second = hidden.split([6, 6], -1)
            hidden = torch.cat([first, second], -1)
        output: Tensor = x + self.down(hidden)
        return output


@pytest.mark.parametrize("kind", ["reshape", "split"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_site_whose_width_stands_in_the_code_is_left_out(
    kind: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(kind if number == place else "") for number in range(3))).eval()
    images = torch.randn(4, 6)
    with caplog.at_level(logging.INFO, "vbp"):
        sites = find_sites(model, images)
    assert [site.name for site in sites] == [f"{number}.up" for number in range(3) if number != place]
    assert f"{place}.up is no site: its code needs that width" in caplog.text
    prune_(model, make_plan(sites, {site.name: torch.rand(12) for site in sites}, keep_ratio=0.5))
    assert model(images).shape == (4, 6)


class Halves(nn.Module):
    """Two parts of one layer's rows, read by a layer each; `chunk` makes them equal however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.first, self.second = nn.Linear(6, 12), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.gelu(self.up(x)).chunk(2, -1)
        output: Tensor = self.first(first) + self.second(second)
        return output


def test_sites_that_must_be_of_one_width_do_not_stay_beside_each_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Halves(), nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)).eval()
    (site,) = find_sites(model, torch.randn(4, 6))
    assert site.name == "1"
