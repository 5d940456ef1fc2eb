"""What is preserved of a model's output: chosen by what it returns, compared and differentiated by plain formulas."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vbp import DenseReference, InputError, collect_statistics, find_sites, prune
from vbp.method.sampling import RandomProbes
from vbp.statistics.gradients import GradientSum
from vbp.statistics.objective import Objective, channel_dim_of, is_classifier
from vbp.statistics.text_embeddings import TextEmbeddings

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tower(nn.Module):
    """A small encoder: an MLP over the patches of an image; it returns what its `form` makes of its tokens."""

    def __init__(self, form: Any = lambda tokens, rows: tokens) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc1, self.fc2 = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm, self.head, self.form = nn.LayerNorm(6), nn.Linear(6, 4), form

    def forward(self, pixels: Tensor) -> Any:
        tokens = self.embed(pixels).flatten(2).transpose(1, 2)
        tokens = self.norm(tokens + self.fc2(F.gelu(self.fc1(tokens))))
        return self.form(tokens, tokens.mean(1))


def named(objective: Objective) -> list[str]:
    return [str(part) for part in objective.parts]


@pytest.mark.parametrize(
    ("form", "parts", "embedded"),
    [
        (lambda tokens, rows: rows, ["output (pooled)"], "output"),
        (lambda tokens, rows: tokens, ["output (4 positions)", "output (pooled)"], "output"),
        (lambda tokens, rows: (tokens, rows), ["0 (4 positions)", "1 (pooled)"], "1"),
        (
            lambda tokens, rows: {"last_hidden_state": tokens, "pooler_output": rows, "hidden_states": (tokens,)},
            ["last_hidden_state (4 positions)", "pooler_output (pooled)"],
            "pooler_output",
        ),
        (
            lambda tokens, rows: {"pooler_output": rows, "image_embeds": 2 * rows},
            ["pooler_output (pooled)", "image_embeds (pooled)"],
            "image_embeds",
        ),
        (
            lambda tokens, rows: [tokens.mT.unflatten(2, (2, 2)), [tokens[:, :1].mT.unflatten(2, (1, 1))]],
            ["0 (4 positions)", "1.0 (pooled)"],
            "1.0",
        ),
    ],
)
def test_features_are_chosen_from_what_a_model_returns(form: Any, parts: list[str], embedded: str) -> None:
    objective = Objective.of(Tower(form), [IMAGES])
    assert (objective.kind, named(objective), objective.embedded) == ("features", parts, embedded)
    assert all(part in objective.sentence() for part in parts)


def test_a_classifier_is_told_from_an_encoder() -> None:
    def logits(tokens: Tensor, rows: Tensor) -> Tensor:
        made: Tensor = classifier.head(rows)
        return made

    classifier = Tower(logits)
    assert is_classifier(classifier, IMAGES)
    assert Objective.of(classifier, [IMAGES]).kind == "logits"
    assert is_classifier(Tower(lambda tokens, rows: SimpleNamespace(logits=logits_of_(rows))), IMAGES)
    assert not is_classifier(Tower(lambda tokens, rows: rows), IMAGES)  # a norm comes last
    classifier.num_classes = 0
    assert not is_classifier(classifier, IMAGES)
    for name, classifies in (("test_vit", True), ("test_resnet", True)):
        model = timm.create_model(name)
        pixels = torch.randn(2, 3, 160, 160)
        assert is_classifier(model.eval(), pixels) is classifies
        model.reset_classifier(0)
        assert not is_classifier(model, pixels)


def logits_of_(rows: Tensor) -> Tensor:
    return nn.functional.linear(rows, torch.eye(6))


def test_a_pyramid_of_timm_is_several_outputs() -> None:
    model = timm.create_model("test_convnext", features_only=True)
    objective = Objective.of(model, [torch.randn(3, 3, 64, 64)])
    assert len(objective.parts) == 2 * len(model.feature_info.channels())
    assert [len(part.scale) for part in objective.parts[::2]] == model.feature_info.channels()


def test_channels_come_first_or_last() -> None:
    assert channel_dim_of(torch.empty(2, 8, 5, 5)) == -3
    assert channel_dim_of(torch.empty(2, 5, 5, 8)) == -1
    assert channel_dim_of(torch.empty(2, 8, 5, 7)) == -3
    assert channel_dim_of(torch.empty(2, 5, 8)) == -1


def test_the_loss_is_the_standardised_squared_error_of_tokens_and_pooled_features() -> None:
    model = Tower().double()
    images = IMAGES.double()
    with torch.no_grad():
        tokens = model(images)
    objective, other = Objective.of(model, [images]), tokens + 0.1 * torch.randn_like(tokens)
    expected = 0.0
    for dense, changed in ((tokens, other), (tokens.mean(1, keepdim=True), other.mean(1, keepdim=True))):
        variance = dense.flatten(0, 1).var(0, correction=0)
        expected += float(((dense - changed) ** 2 / (variance + 0.01 * variance.mean())).mean()) / 2
    target = objective.target(objective.read(tokens))
    assert float(objective.loss(objective.read(other), target)) / 6 == pytest.approx(expected, rel=1e-5)
    mean = tokens.flatten(0, 1).mean(0).expand_as(tokens)
    only_tokens = Objective("features", objective.parts[:1], "output")
    target = only_tokens.target(only_tokens.read(tokens))
    assert float(only_tokens.loss(only_tokens.read(mean), target)) / 6 == pytest.approx(1, rel=0.02)


def test_directions_have_the_second_derivative_of_the_loss_as_covariance() -> None:
    model = Tower(lambda tokens, rows: rows).double()
    objective = Objective.of(model, [IMAGES.double()])
    with torch.no_grad():
        values = objective.read(model(IMAGES[:1].double()))
    target = objective.target(values)
    curvature = torch.autograd.functional.hessian(lambda z: objective.loss(z[None], target), values[0])
    noise = torch.eye(6, dtype=torch.float64)
    drawn = objective.direction(values.expand(6, 6), noise)
    torch.testing.assert_close(drawn.T @ drawn, curvature, rtol=1e-6, atol=1e-9)


def test_sensitivities_predict_what_an_error_does_to_the_features() -> None:
    """As many probes as it takes: G_i' G_i summed over images is the Gauss-Newton matrix of the consumer."""
    model = Tower(lambda tokens, rows: rows).double().eval()
    images = torch.randn(40, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = Objective.of(model, [images])
    sites = find_sites(model, images[:1])
    probes = RandomProbes(input_columns=400, output_columns=400)
    seen = collect_statistics(model, sites, [images.repeat(30, 1, 1, 1)], sensitivity=probes, objective=objective)
    (sensitivity,) = seen.sensitivities.values()
    reference = DenseReference(model, [images], objective=objective)
    error = 1e-3 * torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    changed = Tower(model.form).double()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.fc2.weight += error
    here = sensitivity.recentred(torch.zeros(10, dtype=torch.float64))
    share = sensitivity.outputs / sensitivity.outputs.trace()
    predicted = 0.5 * float((share @ error @ here.inputs[:-1, :-1] @ error.T).trace()) / sensitivity.images
    # The factored form is no identity: right within a factor, and scaled as the features are.
    assert 0.4 < predicted / reference.divergence(changed) < 2.5


def test_what_a_softmax_does_not_see_is_seen() -> None:
    model = Tower(lambda tokens, rows: rows)
    reference = DenseReference(model, [IMAGES[:4], IMAGES[4:]])
    assert reference.objective.kind == "features"
    assert reference.divergence(model) == pytest.approx(0, abs=1e-9)
    moved = Tower(lambda tokens, rows: rows + 1)
    moved.load_state_dict(model.state_dict())
    assert reference.divergence(moved) > 1


def test_the_divergence_of_features_is_shared_out_among_sites() -> None:
    model = timm.create_model("test_vit", num_classes=0).double().eval()
    images = torch.randn(4, 3, 160, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = prune(model, [images], keep_ratio=0.95, criterion="variance", progress=False)
    reference = DenseReference(model, [images])
    shares = reference.site_contributions(result.model, result.plan)
    assert list(shares) == [entry.site.name for entry in result.plan.sites]
    assert sum(shares.values()) == pytest.approx(reference.divergence(result.model), rel=0.5)


def test_similarities_with_texts_are_compared_by_kl() -> None:
    text = TextEmbeddings(torch.randn(5, 6, generator=torch.Generator().manual_seed(3)), scale=4.0)
    model = Tower(lambda tokens, rows: {"last_hidden_state": tokens, "image_embeds": rows})
    objective = Objective.of(model, [IMAGES], "zeroshot", text)
    assert (objective.kind, objective.embedded) == ("zeroshot", "image_embeds")
    other = Tower(lambda tokens, rows: {"image_embeds": rows.roll(1, 1)})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        rows = model(IMAGES)["image_embeds"]
        dense, changed = (
            (4 * F.cosine_similarity(each[:, None], text.rows[None], dim=2)).log_softmax(1)
            for each in (rows, rows.roll(1, 1))
        )
    expected = float((dense.exp() * (dense - changed)).sum(1).mean())
    found = DenseReference(model, [IMAGES], objective=objective).divergence(other)
    assert found == pytest.approx(expected, rel=1e-4)


def test_text_embeddings_are_read_from_files(tmp_path: Path) -> None:
    rows = torch.randn(3, 4)
    save_file(
        {"text_embeddings": rows, "other": rows * 2, "logit_scale": torch.tensor(50.0)}, tmp_path / "a.safetensors"
    )
    save_file({"weights": rows}, tmp_path / "b.safetensors")
    np.save(tmp_path / "c.npy", rows.numpy())
    for name, scale in (("a.safetensors", 50), ("b.safetensors", 100), ("c.npy", 100)):
        read = TextEmbeddings.load(tmp_path / name)
        torch.testing.assert_close(read.rows, F.normalize(rows, dim=1))
        assert read.scale == scale
    assert TextEmbeddings.load(tmp_path / "b.safetensors").fingerprint == read.fingerprint
    save_file({"a": rows, "b": rows + 1}, tmp_path / "two.safetensors")
    save_file({"text_embeddings": rows[:1]}, tmp_path / "one.safetensors")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    (tmp_path / "texts.txt").write_text("a cat")
    for name, fault in (
        ("two.safetensors", "one matrix must be there, or one named text_embeddings, got a, b"),
        ("one.safetensors", r"at least two rows of finite numbers, .*got shape \[1, 4\]"),
        ("bad.npy", "holds no readable embeddings"),
        ("texts.txt", r"must end in \.safetensors or \.npy"),
        ("none.npy", "must be an existing file"),
    ):
        with pytest.raises(InputError, match=fault):
            TextEmbeddings.load(tmp_path / name)
    with pytest.raises(InputError, match="logit_scale must be above 0 and finite, got inf"):
        TextEmbeddings(rows, math.inf)


def test_what_a_model_does_not_return_is_refused() -> None:
    tokens = Tower(lambda tokens, rows: {"last_hidden_state": tokens})
    rows = Tower(lambda tokens, rows: rows)
    text = TextEmbeddings(torch.randn(5, 7))
    for model, choice, given, fault in (
        (tokens, "logits", None, "a classifier must return a tensor"),
        (rows, "zeroshot", None, "needs text embeddings, got none; give --text_embeddings FILE"),
        (rows, "zeroshot", text, r"one embedding of 7 numbers for each image, .*got shape \[6, 6\] of Tower"),
        (tokens, "zeroshot", text, "one embedding of 7 numbers"),
        (Tower(lambda tokens, rows: rows.long()), "auto", None, "returns tensors of numbers, got Tower"),
        (Tower(lambda tokens, rows: rows * torch.nan), "features", None, "must be finite, got NaN"),
        (Tower(lambda tokens, rows: rows * 0), "features", None, "must differ between calibration images"),
    ):
        with pytest.raises(InputError, match=fault):
            Objective.of(model, [IMAGES], choice, given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got none"):
        Objective.of(rows, [])


def test_gradients_by_labels_are_for_classifiers() -> None:
    model = Tower(lambda tokens, rows: rows)
    with pytest.raises(InputError, match="gradients by labels must come from a classifier, got Tower"):
        GradientSum(model, find_sites(model, IMAGES[:1])).add_(IMAGES, torch.zeros(6, dtype=torch.long))


def test_fingerprints_tell_objectives_apart() -> None:
    rows, tokens = Tower(lambda tokens, rows: rows), Tower()
    prints = [
        Objective.of(model, [images]).fingerprint for model in (rows, tokens) for images in (IMAGES, IMAGES[:4])
    ]
    assert len(set(prints)) == 4
    assert Objective("logits").fingerprint == ""
