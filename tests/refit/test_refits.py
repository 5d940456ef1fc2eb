"""All refits in one call: what the single ones give, on the images that a run would take, and nothing by accident."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from pairs_of_models import pruned_pair
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vbp
from vbp import DenseReference, InputError, refit_
from vbp.refit.head import refit_head_
from vbp.refit.producers import refit_producers_
from vbp.refit.refits import Refits
from vbp.refit.stream import refit_stream_
from vbp.statistics.images import GivenImages
from vbp.statistics.mlp_samples import MLPSamples

VIT = FAMILIES["timm-vit"]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same weights."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_one_call_does_what_a_run_does() -> None:
    dense, pruned, sites, images = pruned_pair(VIT, keep_ratio=0.25)
    before, by_hand = copy.deepcopy(dense), copy.deepcopy(pruned)
    report = refit_(pruned, dense, sites, images.split(5))
    # A quarter judges the stream; producers and stream are fitted to the rest, the last layer to all.
    judging = len(images) // 4
    judge, rest = DenseReference(dense, [images[:judging]]), images[judging:]
    producers = refit_producers_(by_hand, MLPSamples(dense, sites, images[:1], [rest]))
    stream = refit_stream_(by_hand, sites, [rest], judge)
    head = refit_head_(by_hand, DenseReference(dense, [images]))
    assert report.producers is not None
    assert report.stream is not None
    assert report.head is not None
    assert (report.producers.images, report.stream.images, report.stream.judged) == (len(rest), len(rest), judging)
    assert report.head.images == len(images)
    for mine, theirs in ((report.stream, stream), (report.head, head)):
        assert mine.before == pytest.approx(theirs.before, rel=1e-9)
        assert mine.after == pytest.approx(theirs.after, rel=1e-6)
    for name, errors in report.producers.errors.items():
        assert errors == pytest.approx(producers.errors[name])
    for name, value in pruned.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name])
    assert same(dense, before)
    reference = DenseReference(dense, [images])
    assert reference.divergence(pruned) <= reference.divergence(by_hand) * 1.001


def test_each_refit_can_be_left_out() -> None:
    dense, pruned, sites, images = pruned_pair(VIT, keep_ratio=0.25)
    untouched = copy.deepcopy(pruned)
    report = refit_(pruned, dense, sites, [images], producers=False, stream=False, head=False)
    assert (report.producers, report.stream, report.head) == (None, None, None)
    assert same(pruned, untouched)
    report = refit_(pruned, dense, sites, [images], producers=False, stream=False)
    assert (report.producers, report.stream) == (None, None)
    assert report.head is not None
    changed = [name for name, value in pruned.state_dict().items() if not value.equal(untouched.state_dict()[name])]
    assert set(changed) <= {"head.weight", "head.bias"}


def test_several_pruned_models_share_what_the_dense_one_predicts() -> None:
    dense, pruned, sites, images = pruned_pair(VIT, keep_ratio=0.25)
    refits, calls = Refits(dense, sites, images[:1], GivenImages([images])), []
    handle = dense.register_forward_hook(lambda *_: calls.append(0))
    alone = copy.deepcopy(pruned)
    refits.refit_(pruned, only=["head"])
    first = len(calls)
    refits.refit_(copy.deepcopy(alone), only=["head"])
    handle.remove()
    assert len(calls) - first == 1  # a look at the last layer, and no second pass over the images
    assert refits.refit_(alone, only=["producers"]).head is None


def test_a_loader_with_labels_gives_what_its_images_give() -> None:
    dense, pruned, sites, images = pruned_pair(VIT, keep_ratio=0.25)
    other = copy.deepcopy(pruned)
    labels = torch.zeros(len(images), dtype=torch.long)
    refit_(pruned, dense, sites, DataLoader(TensorDataset(images, labels), batch_size=6))
    refit_(other, dense, sites, list(images.split(6)))
    assert same(pruned, other)


def test_what_a_model_does_not_have_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    dense, pruned, sites, images = pruned_pair(FAMILIES["timm-deit"], keep_ratio=0.5)
    with caplog.at_level("INFO", "vbp"):
        report = refit_(pruned, dense, sites, [images])
    assert report.head is None
    assert "the last layer stays as it is: the refit of the head needs a model" in caplog.text
    with pytest.raises(InputError, match="one last Linear layer"):
        Refits(dense, sites, images[:1], GivenImages([images]), head="on")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter([torch.zeros(1)]), "can be gone through several times"),
        ([], "must hold calibration images, got none"),
    ],
)
def test_batches_must_hold_images_and_last(batches: list[Tensor], message: str) -> None:
    dense, pruned, sites, _ = pruned_pair(VIT)
    untouched = copy.deepcopy(pruned)
    with pytest.raises(InputError, match=message):
        vbp.refit_(pruned, dense, sites, batches)
    assert same(pruned, untouched)
