"""The type of a forward pass is the one asked for, or an error; TF32 and the layout of images are set explicitly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from vbp import InputError
from vbp.runtime.choices import Amp
from vbp.runtime.precision import Precision, in_float32, memory_format_for, move_, set_matmul_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pretend that there is a GPU, with bf16 or without."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: request.param)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")


@pytest.mark.parametrize(("gpu", "amp", "name"), [
    (True, "auto", "bf16"), (True, "bf16", "bf16"), (True, "fp16", "fp16"), (True, "off", "off"),
    (False, "auto", "off"), (False, "fp16", "fp16"),
], indirect=["gpu"])  # fmt: skip
def test_on_a_gpu_auto_is_bf16_where_it_has_it(gpu: None, amp: Amp, name: str) -> None:
    precision = Precision.choose(amp, GPU)
    assert (precision.name, precision.device_type) == (name, "cuda")


@pytest.mark.parametrize("gpu", [False], indirect=True)
def test_bf16_is_not_emulated(gpu: None) -> None:
    with pytest.raises(InputError, match="amp bf16 needs a GPU that computes in it, got Old GPU; give --amp fp16"):
        Precision.choose("bf16", GPU)


@pytest.mark.parametrize(("amp", "name"), [("auto", "off"), ("off", "off"), ("bf16", "bf16")])
def test_on_a_cpu_only_what_was_asked_for_changes_anything(amp: Amp, name: str) -> None:
    assert Precision.choose(amp, CPU).name == name


@pytest.mark.parametrize(("amp", "message"), [
    ("fp16", "amp fp16 needs a GPU, got device cpu; give --amp bf16"), ("fp8", "amp must be auto, .*got 'fp8'"),
])  # fmt: skip
def test_what_cannot_be_is_named(amp: Amp, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Precision.choose(amp, CPU)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_forward_pass_computes_in_the_type_and_fp16_alone_scales(dtype: torch.dtype | None) -> None:
    precision = Precision(dtype)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == (dtype or torch.float32)
    assert precision.scaler().is_enabled() == (dtype == torch.float16)
    assert Precision() == Precision()


def test_half_logits_are_widened_and_others_left() -> None:
    for dtype, wide in (("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2):
        assert in_float32(torch.zeros(1, dtype=getattr(torch, dtype))).dtype == getattr(torch, wide)


@pytest.fixture
def _settings_put_back() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("_settings_put_back")
def test_tf32_is_set_for_products_and_convolutions_alike() -> None:
    for precision, tf32 in (("high", True), ("highest", False), ("high", True)):
        set_matmul_precision(precision)  # type: ignore[arg-type]
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == precision  # what torch.compile asks for
    with pytest.raises(InputError, match="matmul_precision must be highest or high, got 'medium'"):
        set_matmul_precision("medium")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "last"), [
    ("timm-vit", False), ("timm-swin", False), ("timm-convnext-conv", True), ("hf-convnext", True), ("hf-vit", False),
    ("torchvision-convnext", True),
])  # fmt: skip
def test_convolutional_networks_are_channels_last(name: str, last: bool) -> None:
    model = FAMILIES[name].build()
    for device in (CPU, GPU):
        assert memory_format_for(model, device) == (torch.channels_last if last else torch.preserve_format)
    assert memory_format_for(model, torch.device("meta")) == torch.preserve_format


def test_channels_last_weights_give_the_same_logits() -> None:
    family = FAMILIES["timm-convnext-conv"]
    torch.manual_seed(0)
    model = family.build().double().eval()
    expected = model(family.example())
    layouts: list[bool] = []
    assert move_(model, CPU) is model

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    model.get_submodule("stem.0").register_forward_hook(note)
    torch.testing.assert_close(model(family.example()), expected, rtol=1e-10, atol=1e-12)
    assert layouts == [True]  # though the images are not
