"""The architectures of the tests and of docs/architectures.md: each built small, with random weights, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from families import randomise_
from timm.models import metaformer, mlp_mixer
from torch import Tensor, nn

from vbp import Site, find_sites, split_attention_

CLASSES = 7
Library = Literal["timm", "transformers", "torchvision"]

# Why attention is refused: the last after a trial on a copy.
NONE = "no softmax attention"
ROTARY = "rotary embedding between the layers of queries and keys and the softmax"
COSINE = "queries and keys are normalised (cosine attention)"
NORMALISED_ROWS = "a batch norm over query, key and value rows interleaved head by head"
BESIDE = "values also feed a depthwise convolution beside the softmax"
WRITTEN_WIDTH = "the code writes the width of all heads into a reshape"
COSINE_AND_WIDTH = f"{COSINE}; values alone: {WRITTEN_WIDTH}"
BESIDE_AND_WIDTH = f"{BESIDE}; where they do not, {WRITTEN_WIDTH}"


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family, how a small member of it is built, and what must be found in it.

    Attributes:
        family: As people call it.
        library: Who builds it.
        name: timm's or torchvision's model name, or the prefix of a transformers class.
        sites: MLP sites that must be found; 0 where the model must be refused.
        attention: Attentions that can be pruned, or the reason why they are refused.
        size: Edge of the images in pixels.
        arguments: What makes it small; plain JSON types.
        build_by_hand: For a model whose factory takes no such arguments.
        inexact: MLP sites behind a norm over their own channels.
        refusal: Why there is no site.
        left_out: Attention that is not pruned beside that which is.
        convolutions: Look between kernels of any size, with `find_sites(..., convolutions=True)`.
        split: Its attentions are split by `vbp.split_attention_`.
        values_alone: What stands between queries, keys and the softmax, so that values alone can be pruned.
    """

    family: str
    library: Library
    name: str
    sites: int
    attention: int | str
    size: int = 32
    arguments: Mapping[str, Any] = field(default_factory=dict)
    build_by_hand: Callable[[], nn.Module] | None = None
    inexact: int = 0
    refusal: str = ""
    left_out: str = ""
    convolutions: bool = False
    split: bool = False
    values_alone: str = ""

    @property
    def label(self) -> str:
        """Return a unique, readable name."""
        return f"{self.library} {self.family}"

    def cells(self) -> tuple[str, ...]:
        """Return what the document says of it: names, sites, whether they are exact, and attention."""
        found = str(self.attention) + (", split" if self.split else "")
        found += f"; not {self.left_out}" if self.left_out else ""
        found += f"; values alone: {self.values_alone}" if self.values_alone else ""
        attention = found if isinstance(self.attention, int) else f"refused: {self.attention}"
        exact = f"exact, {self.inexact} inexact" if self.inexact else "exact"
        exact = "inexact" if self.inexact == self.sites else exact
        return (
            self.family,
            self.library,
            f"`{self.name}`",
            str(self.sites),
            f"refused: {self.refusal}" if self.refusal else exact,
            attention,
        )

    def build(self) -> nn.Module:
        """Return a fresh model in evaluation mode."""
        if self.build_by_hand is not None:
            return self.split_(self.build_by_hand().eval())
        if self.library == "timm":
            return self.split_(timm.create_model(self.name, num_classes=CLASSES, **self.arguments).eval())
        return _hugging_face(self.name, self.arguments).eval()

    def split_(self, model: nn.Module) -> nn.Module:
        """Split the attentions of a model, in place, where that is wanted, and return it."""
        if self.split:
            split_attention_(model)
        return model

    def find(self, model: nn.Module, images: Tensor, *, attention: bool = False) -> tuple[Site, ...]:
        """Find the sites of this model."""
        return find_sites(model, images[:1], attention=attention, convolutions=self.convolutions)

    def images(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return random images."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64).to(dtype)


def noticeable_(model: nn.Module, images: Tensor) -> nn.Module:
    """Randomise weights so that every channel shows in the logits and no LayerScale or zero GRN hides a mistake.

    Matrices keep the size of what passes them, and batch norms take the statistics of these images, lest activations
    saturate or vanish on the way.
    """
    randomise_(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(0.3 * parameter[0].numel() ** 0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(images)
    return model.eval()


def _hugging_face(kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    import transformers  # slow to import

    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **arguments)
    model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
    return model


def _mixer() -> nn.Module:
    return mlp_mixer.MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=CLASSES)


def _metaformer(**arguments: Any) -> Callable[[], nn.Module]:
    small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 32), "num_classes": CLASSES}
    return lambda: metaformer.MetaFormer(**small, **arguments)


_POOLFORMER = _metaformer(
    downsample_norm=None,
    mlp_act=nn.GELU,
    mlp_bias=True,
    norm_layers=metaformer.GroupNorm1,
    layer_scale_init_values=1e-5,
    res_scale_init_values=None,
    use_mlp_head=False,
)
_CONVFORMER = _metaformer(token_mixers=metaformer.SepConv, norm_layers=metaformer.LayerNorm2dNoBias)
_CAFORMER = _metaformer(
    token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
    norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=CLASSES)


def _torchvision_resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8, num_classes=CLASSES)


def _torchvision_resnet_wrapped() -> nn.Module:
    """Return a ResNet whose kernels wrap around the border: zero padding would make the mean shift inexact there."""
    model = _torchvision_resnet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            assert isinstance(module.padding, tuple)
            module._reversed_padding_repeated_twice = [side for side in module.padding[::-1] for _ in range(2)]
    return model


def _torchvision_mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    model: nn.Module = mobilenet_v2(width_mult=0.25, num_classes=CLASSES)
    return model


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
_CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
_MAXVIT = {"img_size": 64, "embed_dim": [32, 64], "depths": [1, 1], "stem_width": 16}
_COATNET = {"img_size": 64, "embed_dim": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "stem_width": [8, 16]}
_EFFICIENTFORMER = {"depths": [1, 1, 1, 2], "embed_dims": [16, 16, 32, 32]}
_EFFICIENTFORMER_V2 = {**_EFFICIENTFORMER, "img_size": 64}
_PVT = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 32, 32], "num_heads": [1, 2, 2, 2]}
_HIERA = {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": [1, 1, 2, 1]}
_LEVIT = {"img_size": 64, "embed_dim": [32, 48, 64], "num_heads": [2, 2, 2], "depth": [1, 1, 1]}
_CLASS_ATTENTION = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
_TINYVIT = {"embed_dims": [16, 32, 32, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2]}
_HF_VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_HF_MLP = {**_HF_VIT, "intermediate_size": 64}
_HF_SWIGLU = {**_HF_VIT, "use_swiglu_ffn": True}
_HF_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_HF_CONVNEXT = {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_HF_PYRAMID = {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
_HF_PVT = {"image_size": 64, "num_attention_heads": [1, 2, 2, 2], **_HF_PYRAMID}
_POOLING = "the pooling head, whose query is a parameter"

TIMM = (
    Architecture("ViT", "timm", "vit_tiny_patch16_224", 2, 2, arguments=_VIT),
    Architecture("DeiT, distillation token", "timm", "deit_tiny_distilled_patch16_224", 2, 2, arguments=_VIT),
    Architecture("DeiT-III", "timm", "deit3_small_patch16_224", 2, 2, arguments=_VIT),
    Architecture("BEiT", "timm", "beit_base_patch16_224", 2, 2, arguments=_VIT, split=True),
    Architecture("SigLIP", "timm", "vit_base_patch16_siglip_224", 3, 2, arguments=_VIT, left_out=_POOLING),
    Architecture("DINOv2", "timm", "vit_small_patch14_dinov2", 2, 2, arguments=_VIT),
    Architecture("DINOv2 giant, packed SwiGLU", "timm", "vit_giant_patch14_dinov2", 2, 2, arguments=_VIT),
    Architecture("DINOv3", "timm", "vit_small_patch16_dinov3", 2, 2, arguments=_VIT, split=True, values_alone=ROTARY),
    Architecture(
        "DINOv3, separate SwiGLU",
        "timm",
        "vit_huge_plus_patch16_dinov3",
        2,
        2,
        arguments=_VIT,
        split=True,
        values_alone=ROTARY,
    ),
    Architecture(
        "EVA-02, packed SwiGLU",
        "timm",
        "eva02_tiny_patch14_224",
        2,
        2,
        arguments=_VIT,
        split=True,
        values_alone=ROTARY,
    ),
    Architecture(
        "EVA-02, separate SwiGLU with LayerNorm",
        "timm",
        "eva02_base_patch14_224",
        2,
        2,
        arguments=_VIT,
        inexact=2,
        split=True,
        values_alone=ROTARY,
    ),
    Architecture("Swin", "timm", "swin_tiny_patch4_window7_224", 3, 3, 64, _SWIN),
    Architecture("Swin v2", "timm", "swinv2_tiny_window8_256", 3, 3, 64, _SWIN, split=True, values_alone=COSINE),
    Architecture("ConvNeXt, Linear layers", "timm", "convnext_tiny", 5, NONE, 64, _CONVNEXT),
    Architecture("ConvNeXt, 1x1 convolutions", "timm", "convnext_atto", 5, NONE, 64, _CONVNEXT),
    Architecture("ConvNeXt v2 (GRN), Linear layers", "timm", "convnextv2_tiny", 5, NONE, 64, _CONVNEXT, inexact=5),
    Architecture("ConvNeXt v2 (GRN), 1x1 convolutions", "timm", "convnextv2_atto", 5, NONE, 64, _CONVNEXT, inexact=5),
    Architecture("MaxViT", "timm", "maxvit_tiny_tf_224", 9, 4, 64, _MAXVIT),
    Architecture("CoAtNet", "timm", "coatnet_0_rw_224", 6, 2, 64, _COATNET),
    Architecture("MLP-Mixer", "timm", "mixer_s32_224", 4, NONE, build_by_hand=_mixer),
    Architecture("PoolFormer", "timm", "poolformer_s12", 4, NONE, 64, build_by_hand=_POOLFORMER),
    Architecture("ConvFormer", "timm", "convformer_s18", 9, NONE, 64, build_by_hand=_CONVFORMER, inexact=1),
    Architecture("CAFormer", "timm", "caformer_s18", 7, WRITTEN_WIDTH, 64, build_by_hand=_CAFORMER, inexact=1),
    Architecture("EfficientFormer", "timm", "efficientformer_l1", 5, 1, 224, _EFFICIENTFORMER),
    Architecture("EfficientFormer v2", "timm", "efficientformerv2_s0", 5, BESIDE_AND_WIDTH, 64, _EFFICIENTFORMER_V2),
    Architecture("MobileViT", "timm", "mobilevit_xxs", 17, 9, 64),
    Architecture("PVTv2, depthwise convolution in the MLP", "timm", "pvt_v2_b0", 4, WRITTEN_WIDTH, 64, _PVT),
    Architecture("Hiera", "timm", "hiera_tiny_224", 5, WRITTEN_WIDTH, 64, _HIERA),
    Architecture("LeViT", "timm", "levit_128s", 5, NORMALISED_ROWS, 64, _LEVIT),
    Architecture("LeViT, 1x1 convolutions", "timm", "levit_conv_128s", 5, NORMALISED_ROWS, 64, _LEVIT),
    Architecture("XCiT", "timm", "xcit_nano_12_p16_224", 4, WRITTEN_WIDTH, 64, _CLASS_ATTENTION),
    Architecture("CaiT", "timm", "cait_xxs24_224", 4, WRITTEN_WIDTH, 64, _CLASS_ATTENTION),
    Architecture("TinyViT", "timm", "tiny_vit_5m_224", 8, 4, 64, _TINYVIT),
)
HUGGING_FACE = (
    Architecture("ViT", "transformers", "ViT", 2, 2, arguments=_HF_MLP),
    Architecture("DeiT", "transformers", "DeiT", 2, 2, arguments=_HF_MLP),
    Architecture("BEiT", "transformers", "Beit", 2, 2, arguments=_HF_MLP),
    Architecture("DINOv2", "transformers", "Dinov2", 2, 2, arguments=_HF_VIT),
    Architecture("DINOv2 giant, separate SwiGLU", "transformers", "Dinov2", 2, 2, arguments=_HF_SWIGLU),
    Architecture(
        "SigLIP vision", "transformers", "Siglip", 3, 2, arguments={"vision_config": _HF_MLP}, left_out=_POOLING
    ),
    Architecture("Swin", "transformers", "Swin", 3, 3, arguments=_HF_SWIN),
    Architecture("Swin v2", "transformers", "Swinv2", 3, COSINE_AND_WIDTH, arguments=_HF_SWIN),
    Architecture("ConvNeXt", "transformers", "ConvNext", 5, NONE, 64, _HF_CONVNEXT),
    Architecture("ConvNeXt v2 (GRN)", "transformers", "ConvNextV2", 5, NONE, 64, _HF_CONVNEXT, inexact=5),
    Architecture("PoolFormer", "transformers", "PoolFormer", 4, NONE, 64, _HF_PYRAMID),
    Architecture("PVTv2", "transformers", "PvtV2", 4, WRITTEN_WIDTH, 64, _HF_PVT),
)
TORCHVISION = (
    Architecture("ViT", "torchvision", "vit_b_16", 2, 2, build_by_hand=_torchvision_vit, split=True),
    Architecture("Swin", "torchvision", "swin_t", 3, 3, 64, build_by_hand=_torchvision_swin, split=True),
    Architecture("ConvNeXt", "torchvision", "convnext_tiny", 3, NONE, 64, build_by_hand=_torchvision_convnext),
    Architecture("MobileNetV2", "torchvision", "mobilenet_v2", 17, NONE, 64, build_by_hand=_torchvision_mobilenet),
    Architecture(
        "ResNet",
        "torchvision",
        "resnet50",
        0,
        NONE,
        64,
        build_by_hand=_torchvision_resnet,
        refusal="a 3x3 convolution in every block, a residual sum between blocks; see the next line",
    ),
    Architecture(
        "ResNet, `convolutions=True`, circular padding (zero padding: inexact at borders)",
        "torchvision",
        "resnet50",
        9,
        NONE,
        64,
        build_by_hand=_torchvision_resnet_wrapped,
        convolutions=True,
    ),
)
ARCHITECTURES = (*TIMM, *HUGGING_FACE, *TORCHVISION)
