"""Statistics are those of the value that reaches the consumer, over every image, and survive a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vbp import InputError, Statistics, collect_statistics, find_sites, variance_scores
from vbp.method.covariance import ChannelCovariance
from vbp.method.fisher import SiteSensitivity
from vbp.method.moments import ChannelMoments
from vbp.runtime.fingerprints import model_fingerprint
from vbp.sites.layers import channel_dim


def test_moments_of_what_each_consumer_reads(family: Family) -> None:
    model = family.build().double()
    images = family.example(5)
    sites = find_sites(model, images[:1])
    statistics = collect_statistics(model, sites, [images[:3], (images[3:], torch.zeros(2))])
    assert statistics.images == 5
    for site in sites:
        consumer = model.get_submodule(site.consumer)
        seen: list[Tensor] = []
        handle = consumer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model.eval()(images)
        handle.remove()
        channels_last = seen[0].movedim(1, -1) if isinstance(consumer, nn.Conv2d) else seen[0]
        rows = channels_last.reshape(-1, site.hidden)
        torch.testing.assert_close(statistics.means[site.name], rows.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(statistics.variances[site.name], rows.var(0), rtol=1e-10, atol=1e-14)


def test_statistics_are_taken_after_the_activation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    images = torch.randn(50, 3)
    sites = find_sites(model, images[:1])
    statistics = collect_statistics(model, sites, [images])
    before = model[0](images).detach().double()
    assert not torch.allclose(statistics.means["0"], before.mean(0), atol=1e-2)
    torch.testing.assert_close(statistics.means["0"], F.gelu(before).mean(0), rtol=1e-5, atol=1e-6)


def test_collecting_runs_in_evaluation_mode_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    model[2].eval()
    images = torch.randn(20, 3)
    statistics = collect_statistics(model, find_sites(model, images), [images])
    reference = F.gelu(model[0](images)).detach().double()
    torch.testing.assert_close(statistics.means["0"], reference.mean(0), rtol=1e-5, atol=1e-6)
    assert [module.training for module in model] == [True, True, False, True]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_removed_when_the_data_fails(vit: nn.Module) -> None:
    sites = find_sites(vit, torch.zeros(1, 3, 32, 32, dtype=torch.float64))

    def broken() -> object:
        yield torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        raise InputError("too many unreadable images")

    with pytest.raises(InputError, match="unreadable"):
        collect_statistics(vit, sites, broken())  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_no_image_and_bad_activations_are_errors(vit: nn.Module) -> None:
    sites = find_sites(vit, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(InputError, match="at least one image, got none"):
        collect_statistics(vit, sites, [])
    poisoned = torch.full((2, 3, 32, 32), torch.nan, dtype=torch.float64)
    with pytest.raises(InputError, match=r"site blocks\.0\.mlp\.fc1 must be finite, got NaN or infinity in"):
        collect_statistics(vit, sites, [poisoned])


def test_file_round_trip_and_merge(vit: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    sites = find_sites(vit, images[:1])
    whole = collect_statistics(vit, sites, [images], data="d")
    parts = [collect_statistics(vit, sites, [part], data="d") for part in images.split(2)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.images == 6
    merged.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert (loaded.images, loaded.model, loaded.data) == (6, model_fingerprint(vit), "d")
    assert list(loaded.moments) == [site.name for site in sites]
    for name, moments in whole.moments.items():
        assert torch.equal(loaded.moments[name].mean, merged.moments[name].mean)
        torch.testing.assert_close(loaded.moments[name].m2, moments.m2, rtol=1e-10, atol=1e-14)


def test_statistics_of_another_model_or_data_are_refused(vit: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    statistics = collect_statistics(vit, find_sites(vit, images[:1]), [images], data="these")
    statistics.check_made_for(model_fingerprint(vit), "these", Path("s"))
    with pytest.raises(InputError, match="statistics of this data"):
        statistics.check_made_for(model_fingerprint(vit), "those", Path("s"))
    with torch.no_grad():
        next(vit.parameters()).view(-1)[0] += 1
    with pytest.raises(InputError, match="statistics of this model"):
        statistics.check_made_for(model_fingerprint(vit), "these", Path("s"))
    with pytest.raises(InputError, match="must come from one model"):
        statistics.merge(Statistics(statistics.moments, 2, "other", "these"))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_files_are_one_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "s.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match="collect the statistics again"):
        Statistics.load(file)


def test_a_truncated_file_and_a_missing_file(vit: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    file = tmp_path / "s.safetensors"
    collect_statistics(vit, find_sites(vit, images[:1]), [images]).save(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="no readable statistics file"):
        Statistics.load(file)
    with pytest.raises(InputError, match="must exist"):
        Statistics.load(tmp_path / "absent")


def test_scores_per_layer_have_mean_one_and_dead_sites_stay_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.fill_(-1)
    images = torch.randn(40, 3)
    statistics = collect_statistics(model, find_sites(model, images), [images])
    plain, normed = variance_scores(statistics), variance_scores(statistics, norm_per_layer=True)
    assert normed["0"].mean().item() == pytest.approx(1)
    torch.testing.assert_close(normed["0"] * plain["0"].mean(), plain["0"])
    assert torch.equal(normed["2"], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext-conv", "timm-swin"])
def test_under_autocast_the_sums_stay_exact(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    # Values far from zero, where eight bits of mantissa would leave nothing of a sum.
    images = family.example(16, torch.float32) * 0.1 + 5
    sites = find_sites(model, images[:1])
    seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    handles = [
        model.get_submodule(site.consumer).register_forward_pre_hook(
            lambda module, args, name=site.name: seen[name].append(args[0].movedim(channel_dim(module), -1))
        )
        for site in sites
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = collect_statistics(model, sites, images.split(4))
    for handle in handles:
        handle.remove()
    for site_name, parts in seen.items():
        values = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        assert values.dtype == torch.bfloat16 or values.dtype == torch.float32
        reference = values.double()
        moments = statistics.moments[site_name]
        torch.testing.assert_close(moments.mean, reference.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(moments.variance, reference.var(0), rtol=1e-4, atol=1e-9)


def _everything() -> Statistics:
    """Return statistics of two sites with all that a file can hold."""
    torch.manual_seed(0)
    rows = torch.randn(9, 4, dtype=torch.float64)
    moments = ChannelMoments(9, rows.mean(0), rows.var(0) * 8)
    covariance = ChannelCovariance(9, rows.mean(0), rows.T.cov() * 8)
    sensitivity = SiteSensitivity(3, rows.mean(0), torch.eye(5).double(), torch.eye(2).double())
    other = ChannelMoments(9, torch.ones(3).double(), torch.ones(3).double())
    return Statistics({"up": moments, "down": other}, 3, "m", "d", {"up": covariance}, 0.5, {"up": sensitivity})


def test_no_damaged_byte_is_taken_for_statistics(tmp_path: Path) -> None:
    """Kin to reports of files that load with other numbers after a faulty copy: each byte is changed in turn."""
    path = tmp_path / "s.safetensors"
    _everything().save(path)
    whole = path.read_bytes()
    assert Statistics.load(path).covariances["up"].m2.equal(_everything().covariances["up"].m2)
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="collect the statistics again"):
            Statistics.load(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"moments": {"up": ChannelMoments(9, torch.full((4,), torch.nan), torch.ones(4))}},
            "up/mean must hold finite",
        ),
        ({"moments": {"up": ChannelMoments(9, torch.ones(4), -torch.ones(4))}}, "no negative variance"),
        ({"moments": {"up": ChannelMoments(9, torch.ones(4), torch.ones(3))}}, "up/m2 must have the shape"),
        ({"moments": {"up": ChannelMoments(-9, torch.ones(4), torch.ones(4))}}, "at least one image and sample"),
        ({"images": 0}, "at least one image and sample"),
        ({"token_fraction": 2.0}, "header is damaged"),
        ({"covariances": {"up": ChannelCovariance(9, torch.ones(4), -torch.eye(4))}}, "no negative variance"),
        ({"covariances": {"up": ChannelCovariance(9, torch.ones(3), torch.eye(3))}}, "must have the shape"),
        (
            {"sensitivities": {"up": SiteSensitivity(3, torch.ones(4), torch.eye(4), torch.eye(2))}},
            "must have the shape",
        ),
    ],
)
def test_numbers_that_no_images_lead_to_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    kept = {"covariances": {}, "sensitivities": {}} if "moments" in changed else {}
    replace(_everything(), **{**kept, **changed}).save(path)
    with pytest.raises(InputError, match=message):
        Statistics.load(path)


def test_a_header_without_end_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    for header in ("[" * 10**5, "3", '{"counts": [1]}', '{"counts": {"up": 9}}'):
        save_file({}, path, {"format": "vbp-statistics/2", "header": header})
        with pytest.raises(InputError, match="no readable statistics file"):
            Statistics.load(path)


def test_the_covariance_of_keys_in_an_older_file_is_collected_again(tmp_path: Path) -> None:
    """It was about the mean of all images; the rest of the file holds."""
    family, path = FAMILIES["timm-vit"], tmp_path / "s.safetensors"
    model, images = family.build().double(), family.example(3)
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images], covariance=True)
    statistics.save(path)
    assert Statistics.load(path).covariances.keys() == statistics.covariances.keys()
    with safe_open(path, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["header"]  # noqa: SIM118
    save_file(tensors, path, {"format": "vbp-statistics/2", "header": header})
    old = Statistics.load(path)
    assert statistics.covariances.keys() - old.covariances.keys() == {
        f"{site.name}#key" for site in sites if site.kind == "query_key"
    }
    with pytest.raises(InputError, match=r"must hold the covariance of .*#key"):
        old.check_holds(sites, path, covariance=True)
    old.check_holds(sites, path)
