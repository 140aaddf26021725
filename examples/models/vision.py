"""Small vision models, each with a batch: classifiers, segmentation, generation, images with text, video.

Every function returns (model, batch), seeded; `model(**batch)` is a loss or has `.loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "autoencoder_masked",
    "beit",
    "clip",
    "convnext",
    "convnextv2",
    "cvt",
    "data2vec_vision",
    "dcgan_generator",
    "deit",
    "detr_like",
    "dinov2",
    "dpt",
    "efficientnet",
    "focalnet",
    "levit",
    "mlp_mixer",
    "mobilenet_v2",
    "poolformer",
    "pvt",
    "regnet",
    "resnet",
    "sam_encoder",
    "segformer",
    "siglip",
    "style_transfer",
    "swin",
    "swinv2",
    "unet",
    "unet_bilinear",
    "vae",
    "vgg",
    "video_cnn",
    "videomae",
    "vit",
    "vit_mae",
    "vivit",
    "vq_vae",
]

Batch = dict[str, Any]
Example = tuple[nn.Module, Batch]

SAMPLES, CLASSES = 4, 10


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _classified(model: nn.Module, size: int = 32) -> Example:
    """The model and images with a class each."""
    generator = _generator()
    images = torch.randn(SAMPLES, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    return model.train(), {"pixel_values": images, "labels": labels}


def _segmented(model: nn.Module, size: int = 32, classes: int = 4, ignored: int = 255) -> Example:
    """The model and images with a class for each pixel; some pixels are ignored, unevenly over the batch."""
    generator = _generator()
    images = torch.randn(SAMPLES, 3, size, size, generator=generator)
    labels = torch.randint(0, classes, (SAMPLES, size, size), generator=generator)
    labels[0, : size // 2] = ignored
    labels[3, :2] = ignored
    return model.train(), {"pixel_values": images, "labels": labels}


class _Classifier(nn.Module):
    """Cross entropy of a network's logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(pixel_values), labels)


# Vision transformers.


def vit() -> Example:
    """Patches as a strided convolution, a class token, dropout on attention and hidden states."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return _classified(ViTForImageClassification(config))


def deit() -> Example:
    """A class and a distillation token, whose two heads are averaged by the loss."""
    from transformers import DeiTConfig, DeiTForImageClassification

    torch.manual_seed(0)
    config = DeiTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _classified(DeiTForImageClassification(config))


def beit() -> Example:
    """A learned relative position bias shared by all layers, layer scale, mean pooling."""
    from transformers import BeitConfig, BeitForImageClassification

    torch.manual_seed(0)
    config = BeitConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        use_shared_relative_position_bias=True,
        use_mean_pooling=True,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _classified(BeitForImageClassification(config))


def data2vec_vision() -> Example:
    """A relative position bias of each layer's own."""
    from transformers import Data2VecVisionConfig, Data2VecVisionForImageClassification

    torch.manual_seed(0)
    config = Data2VecVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        use_relative_position_bias=True,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _classified(Data2VecVisionForImageClassification(config))


def dinov2() -> Example:
    """SwiGLU feed-forward, layer scale; positions interpolated to another image size than the configured one."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64,
        mlp_ratio=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
        num_labels=CLASSES,
        use_swiglu_ffn=True,
    )
    return _classified(Dinov2ForImageClassification(config))


def swin() -> Example:
    """Attention in windows that are rolled in every second layer, merging of patches between the stages."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        num_labels=CLASSES,
        drop_path_rate=0.0,
    )
    return _classified(SwinForImageClassification(config))


def swinv2() -> Example:
    """Cosine attention with a clamped learned temperature, positions by a small network, stochastic depth."""
    from transformers import Swinv2Config, Swinv2ForImageClassification

    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        num_labels=CLASSES,
        drop_path_rate=0.1,
    )
    return _classified(Swinv2ForImageClassification(config))


def pvt() -> Example:
    """Keys and values from a strided convolution of the tokens, a pyramid of four stages."""
    from transformers import PvtConfig, PvtForImageClassification

    torch.manual_seed(0)
    config = PvtConfig(
        image_size=32,
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        sequence_reduction_ratios=[4, 2, 1, 1],
        hidden_sizes=[16, 32, 32, 64],
        patch_sizes=[4, 2, 2, 2],
        strides=[4, 2, 2, 2],
        num_attention_heads=[1, 2, 4, 4],
        mlp_ratios=[2, 2, 2, 2],
        num_labels=CLASSES,
        drop_path_rate=0.0,
    )
    return _classified(PvtForImageClassification(config))


def cvt() -> Example:
    """Projections to queries, keys and values by depthwise convolutions with batch normalisation."""
    from transformers import CvtConfig, CvtForImageClassification

    torch.manual_seed(0)
    config = CvtConfig(
        patch_sizes=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        embed_dim=[16, 32],
        num_heads=[2, 4],
        depth=[1, 2],
        mlp_ratio=[2.0, 2.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
        num_labels=CLASSES,
    )
    return _classified(CvtForImageClassification(config))


def levit() -> Example:
    """Convolution stem, batch normalisation over tokens, attention biases looked up by offset."""
    from transformers import LevitConfig, LevitForImageClassification

    torch.manual_seed(0)
    config = LevitConfig(
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 4, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
        drop_path_rate=0,
        num_labels=CLASSES,
    )
    return _classified(LevitForImageClassification(config), size=64)


def focalnet() -> Example:
    """Depthwise convolutions of growing reach, gated and summed instead of attention."""
    from transformers import FocalNetConfig, FocalNetForImageClassification

    torch.manual_seed(0)
    config = FocalNetConfig(
        image_size=32,
        patch_size=4,
        embed_dim=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        num_labels=CLASSES,
    )
    return _classified(FocalNetForImageClassification(config))


def poolformer() -> Example:
    """Average pooling in the place of attention, group normalisation over all channels."""
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    torch.manual_seed(0)
    config = PoolFormerConfig(
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        num_labels=CLASSES,
    )
    return _classified(PoolFormerForImageClassification(config))


def vit_mae() -> Example:
    """Three quarters of the patches hidden at random (sort, gather), the rest decoded to pixels."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        decoder_hidden_size=32,
        decoder_intermediate_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        image_size=32,
        patch_size=8,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )
    model, batch = _classified(ViTMAEForPreTraining(config))
    return model, {"pixel_values": batch["pixel_values"]}


class MlpMixer(nn.Module):
    """Linear layers over channels and, transposed, over patches."""

    def __init__(self, hidden: int = 64, patches: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, hidden, 8, stride=8)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2 * layers))
        self.over_patches = nn.ModuleList(_two_layers(patches, 2 * patches) for _ in range(layers))
        self.over_channels = nn.ModuleList(_two_layers(hidden, 2 * hidden) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for layer, (patches, channels) in enumerate(zip(self.over_patches, self.over_channels, strict=True)):
            x = x + patches(self.norms[2 * layer](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * layer + 1](x))
        return self.head(x.mean(1))


def _two_layers(size: int, wide: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, wide), nn.GELU(), nn.Dropout(0.1), nn.Linear(wide, size))


def mlp_mixer() -> Example:
    """No attention: linear layers over patches and over channels in turn, with dropout."""
    torch.manual_seed(0)
    return _classified(_Classifier(MlpMixer()))


class WindowAttention(nn.Module):
    """Attention in square windows; the bias is the product of queries and learned offsets, for rows and columns apart."""

    offsets: Tensor

    def __init__(self, hidden: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.rows = nn.Parameter(0.02 * torch.randn(2 * side - 1, hidden // heads))
        self.columns = nn.Parameter(0.02 * torch.randn(2 * side - 1, hidden // heads))
        offsets = torch.arange(side)[:, None] - torch.arange(side)[None, :] + side - 1
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count, side, _, hidden = x.shape
        q, k, v = self.qkv(x).reshape(count, side * side, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        grid = q.reshape(count, self.heads, side, side, -1)
        by_row = torch.einsum("nhrcd,rsd->nhrcs", grid, self.rows[self.offsets])
        by_column = torch.einsum("nhrcd,ced->nhrce", grid, self.columns[self.offsets])
        bias = (by_row[..., :, None] + by_column[..., None, :]).reshape(count, self.heads, side * side, side * side)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, side, side, hidden))


class SamEncoder(nn.Module):
    """A block with windows (padded to a whole number of them), a global one, and a neck of convolutions."""

    def __init__(self, hidden: int = 32, heads: int = 4, size: int = 6, window: int = 4) -> None:
        super().__init__()
        self.window = window
        self.embed = nn.Conv2d(3, hidden, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, size, size, hidden))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))
        self.local, self.whole = WindowAttention(hidden, heads, window), WindowAttention(hidden, heads, size)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)) for _ in range(2))
        self.neck = nn.Conv2d(hidden, 16, 3, padding=1, bias=False)
        self.head = nn.Conv2d(16, 4, 1)

    def _in_windows(self, x: Tensor) -> Tensor:
        count, height, width, hidden = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        tall, wide = x.shape[1] // side, x.shape[2] // side
        windows = x.reshape(count, tall, side, wide, side, hidden).transpose(2, 3).reshape(-1, side, side, hidden)
        joined = self.local(windows).reshape(count, tall, wide, side, side, hidden).transpose(2, 3)
        return joined.reshape(count, tall * side, wide * side, hidden)[:, :height, :width]

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(pixel_values).permute(0, 2, 3, 1) + self.positions
        x = x + self._in_windows(self.norms[0](x))
        x = x + self.mlps[0](self.norms[1](x))
        x = x + self.whole(self.norms[2](x))
        x = x + self.mlps[1](self.norms[3](x))
        logits = self.head(self.neck(x.permute(0, 3, 1, 2)))
        return F.cross_entropy(F.interpolate(logits, scale_factor=4, mode="bilinear"), labels)


def sam_encoder() -> Example:
    """Padded windows in one block, whole attention in the other, decomposed relative positions."""
    torch.manual_seed(0)
    return _segmented(SamEncoder(), size=24, ignored=-100)


class Detr(nn.Module):
    """Learned queries attend to the image's features; the k-th query is answerable for the k-th object."""

    def __init__(self, hidden: int = 32, queries: int = 6) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, hidden, 4, stride=4), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, stride=2, padding=1))
        self.positions = nn.Parameter(torch.randn(16, hidden))
        self.queries = nn.Embedding(queries, hidden)
        self.encoder = nn.TransformerEncoderLayer(hidden, 4, 64, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(hidden, 4, 64, dropout=0.0, batch_first=True)
        self.classes, self.boxes = nn.Linear(hidden, CLASSES + 1), nn.Linear(hidden, 4)

    def forward(self, pixel_values: Tensor, classes: Tensor, boxes: Tensor) -> Tensor:
        memory = self.encoder(self.backbone(pixel_values).flatten(2).transpose(1, 2) + self.positions)
        found = self.decoder(self.queries.weight.expand(len(memory), -1, -1), memory)
        logits, guess = self.classes(found), self.boxes(found).sigmoid()
        there = (classes < CLASSES).to(guess.dtype)
        distance = ((guess - boxes).abs().sum(-1) * there).sum() / there.sum()
        overlap = ((1 - _overlap(guess, boxes)) * there).sum() / there.sum()
        weight = torch.ones(CLASSES + 1, device=logits.device)
        weight[-1] = 0.1
        return F.cross_entropy(logits.transpose(1, 2), classes, weight) + 5 * distance + 2 * overlap


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union less the empty part of the hull, of boxes (x, y, width, height)."""
    low_a, high_a, low_b, high_b = (
        a[..., :2] - a[..., 2:] / 2,
        a[..., :2] + a[..., 2:] / 2,
        b[..., :2] - b[..., 2:] / 2,
        b[..., :2] + b[..., 2:] / 2,
    )
    inner = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
    return inner / union - (hull - union) / hull


def detr_like() -> Example:
    """Object detection: queries, box losses over the objects that are there, class weights; the match of query and object is given."""
    torch.manual_seed(0)
    generator = _generator()
    images = torch.randn(SAMPLES, 3, 32, 32, generator=generator)
    classes = torch.randint(0, CLASSES + 1, (SAMPLES, 6), generator=generator)
    classes[0, 2:] = CLASSES  # "nothing": few objects in the first image
    boxes = 0.1 + 0.4 * torch.rand(SAMPLES, 6, 4, generator=generator)
    return Detr().train(), {"pixel_values": images, "classes": classes, "boxes": boxes}


# Convolutional networks.


def convnext() -> Example:
    """7×7 depthwise convolutions, layer norms in two memory layouts, stochastic depth."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, patch_size=4, drop_path_rate=0.1, num_labels=CLASSES)
    return _classified(ConvNextForImageClassification(config))


def convnextv2() -> Example:
    """A norm over the whole image with a mean over the channels (global response normalisation)."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    torch.manual_seed(0)
    config = ConvNextV2Config(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, patch_size=4, num_labels=CLASSES)
    return _classified(ConvNextV2ForImageClassification(config))


def resnet() -> Example:
    """Bottleneck blocks with batch normalisation."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 1], layer_type="bottleneck", num_labels=CLASSES)
    return _classified(ResNetForImageClassification(config))


def regnet() -> Example:
    """Grouped convolutions, squeeze and excitation."""
    from transformers import RegNetConfig, RegNetForImageClassification

    torch.manual_seed(0)
    config = RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, layer_type="y", num_labels=CLASSES)
    return _classified(RegNetForImageClassification(config))


def mobilenet_v2() -> Example:
    """Inverted residuals: wide depthwise convolutions between narrow layers, ReLU6, dropout before the head."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, classifier_dropout_prob=0.1, num_labels=CLASSES)
    return _classified(MobileNetV2ForImageClassification(config))


def efficientnet() -> Example:
    """Depthwise convolutions padded by hand, squeeze and excitation, Swish, batch normalisation."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    torch.manual_seed(0)
    config = EfficientNetConfig(
        image_size=32,
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        depthwise_padding=[],
        strides=[1, 2, 2],
        num_block_repeats=[1, 1, 2],
        expand_ratios=[1, 6, 6],
        drop_connect_rate=0.0,
        dropout_rate=0.0,
        initializer_range=0.3,
        num_labels=CLASSES,
    )
    return _classified(EfficientNetForImageClassification(config))


def vgg() -> Example:
    """Plain convolutions, max pooling, a wide head with dropout."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES)]
    return _classified(_Classifier(nn.Sequential(*layers, *head)))


# Dense prediction.


def segformer() -> Example:
    """A pyramid whose levels are resized, concatenated and fused; reduced keys, depthwise convolution in the feed-forward."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=4,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    return _segmented(SegformerForSemanticSegmentation(config))


def dpt() -> Example:
    """Features of several transformer layers reassembled to images, fused from coarse to fine, with an auxiliary head."""
    from transformers import DPTConfig, DPTForSemanticSegmentation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 16, 32],
        fusion_hidden_size=16,
        readout_type="project",
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        semantic_classifier_dropout=0.0,
    )
    return _segmented(DPTForSemanticSegmentation(config))


class Unet(nn.Module):
    """Two levels with skip connections; opened by transposed convolutions or by bilinear interpolation."""

    def __init__(self, channels: int, bilinear: bool) -> None:
        super().__init__()
        self.bilinear = bilinear
        self.down = nn.ModuleList([self._block(3, channels), self._block(channels, 2 * channels), self._block(2 * channels, 4 * channels)])
        self.up = nn.ModuleList([self._block(6 * channels, 2 * channels), self._block(3 * channels, channels)])
        if not bilinear:
            self.open = nn.ModuleList(
                [nn.ConvTranspose2d(4 * channels, 4 * channels, 2, 2), nn.ConvTranspose2d(2 * channels, 2 * channels, 2, 2)]
            )
        self.head = nn.Conv2d(channels, 4, 1)

    def _block(self, before: int, after: int) -> nn.Sequential:
        norm = nn.GroupNorm(4, after) if self.bilinear else nn.BatchNorm2d(after)
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        fine = self.down[0](pixel_values)
        middle = self.down[1](F.max_pool2d(fine, 2))
        x = self.down[2](F.max_pool2d(middle, 2))
        for level, skipped in enumerate((middle, fine)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if self.bilinear else self.open[level](x)
            x = self.up[level](torch.cat([x, skipped], 1))
        return F.cross_entropy(self.head(x), labels)


def unet() -> Example:
    """Batch normalisation and transposed convolutions."""
    torch.manual_seed(0)
    return _segmented(Unet(8, bilinear=False), size=16, ignored=-100)


def unet_bilinear() -> Example:
    """Group normalisation and bilinear interpolation."""
    torch.manual_seed(0)
    return _segmented(Unet(8, bilinear=True), size=16, ignored=-100)


class StyleTransfer(nn.Module):
    """Keeps the content and takes over the style: equal Gram matrices of the features of a frozen network."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReflectionPad2d(2),
            nn.Conv2d(3, channels, 5),
            nn.InstanceNorm2d(channels, affine=True),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.InstanceNorm2d(channels, affine=True),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(channels, 3, 3, padding=1),
            nn.Tanh(),
        )
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()).requires_grad_(False)

    def _gram(self, features: Tensor) -> Tensor:
        flat = features.flatten(2)
        return flat @ flat.transpose(1, 2) / flat[0].numel()

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        made = self.net(content)
        mine, wanted, styled = self.features(made), self.features(content), self.features(style)
        smooth = (made[..., 1:] - made[..., :-1]).abs().mean() + (made[..., 1:, :] - made[..., :-1, :]).abs().mean()
        return F.mse_loss(mine, wanted) + 10 * F.mse_loss(self._gram(mine), self._gram(styled)) + 0.1 * smooth


def style_transfer() -> Example:
    """Instance normalisation, reflection padding, Gram matrices, a frozen network in the loss, total variation."""
    torch.manual_seed(0)
    generator = _generator()
    content, style = (torch.randn(SAMPLES, 3, 16, 16, generator=generator) for _ in range(2))
    return StyleTransfer().train(), {"content": content, "style": style}


# Generation.


class Generator(nn.Module):
    """Noise [n, z] to images, against given ones."""

    def __init__(self, size: int = 16, channels: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(size, 2 * channels, 4, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(True),
            nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, images: Tensor) -> Tensor:
        return F.mse_loss(self.net(noise[:, :, None, None]), images)


def dcgan_generator() -> Example:
    """A stack of transposed convolutions with batch normalisation and tanh."""
    torch.manual_seed(0)
    generator = _generator()
    return Generator().train(), {"noise": torch.randn(4, 16, generator=generator), "images": torch.rand(4, 3, 16, 16, generator=generator)}


class Vae(nn.Module):
    """Encoder to mean and log variance, a sample of them, decoder; reconstruction plus divergence."""

    def __init__(self, channels: int = 16, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, channels, 4, 2, 1), nn.ReLU(), nn.Conv2d(channels, channels, 4, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.mean, self.log_variance = nn.Linear(channels * 16, latent), nn.Linear(channels * 16, latent)
        self.widen = nn.Sequential(nn.Linear(latent, channels * 16), nn.Unflatten(1, (channels, 4, 4)), nn.ReLU())
        self.decoder = nn.Sequential(nn.ConvTranspose2d(channels, channels, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(channels, 3, 4, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        mean, log_variance = self.mean(features), self.log_variance(features)
        sample = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        made = self.decoder(self.widen(sample))
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return (F.binary_cross_entropy_with_logits(made, images, reduction="sum") + divergence) / len(images)


def vae() -> Example:
    """Draws noise in the forward pass; the loss is a sum over the batch divided by its size."""
    torch.manual_seed(0)
    return Vae().train(), {"images": torch.rand(SAMPLES, 3, 16, 16, generator=_generator())}


class VqVae(nn.Module):
    """Each pixel of the code is replaced by its nearest entry of a table; gradients pass straight through."""

    def __init__(self, channels: int = 16, entries: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, channels, 4, 2, 1), nn.ReLU(), nn.Conv2d(channels, channels, 4, 2, 1))
        self.table = nn.Embedding(entries, channels)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(channels, channels, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(channels, 3, 4, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        code = self.encoder(images).permute(0, 2, 3, 1)
        flat = code.reshape(-1, code.shape[-1])
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.table.weight.t() + self.table.weight.square().sum(1)
        nearest = self.table(distances.argmin(1)).reshape(code.shape)
        commitment = F.mse_loss(nearest, code.detach()) + 0.25 * F.mse_loss(code, nearest.detach())
        through = code + (nearest - code).detach()
        return F.mse_loss(self.decoder(through.permute(0, 3, 1, 2)), images) + commitment


def vq_vae() -> Example:
    """argmin over distances, a straight-through gradient by detach."""
    torch.manual_seed(0)
    return VqVae().train(), {"images": torch.rand(SAMPLES, 3, 16, 16, generator=_generator())}


class MaskedAutoencoder(nn.Module):
    """A learned token stands for the hidden patches; the loss counts these alone."""

    def __init__(self, hidden: int = 64, patch: int = 4, patches: int = 16) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, hidden)
        self.token, self.positions = nn.Parameter(torch.zeros(hidden)), nn.Parameter(0.02 * torch.randn(patches, hidden))
        layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decode = nn.Linear(hidden, 3 * patch * patch)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        x = torch.where(hidden[..., None], self.token, self.embed(patches)) + self.positions
        error = (self.decode(self.encoder(x)) - patches).square().mean(-1)
        return (error * hidden).sum() / hidden.sum()


def autoencoder_masked() -> Example:
    """The hidden patches are an input (bool), unevenly many for each sample; the mean is over them; dropout."""
    torch.manual_seed(0)
    generator = _generator()
    images = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    hidden = torch.rand(SAMPLES, 16, generator=generator) < torch.tensor([0.2, 0.5, 0.7, 0.9])[:, None]
    return MaskedAutoencoder().train(), {"images": images, "hidden": hidden}


# Images with text, video.


def clip() -> Example:
    """Contrastive: the similarity of every image and every text of the batch; the last token found by argmax."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision, text = _towers()
    config = CLIPConfig(text_config=text | {"eos_token_id": 2}, vision_config=vision, projection_dim=32)
    return CLIPModel(config).train(), _pairs()


def siglip() -> Example:
    """A sigmoid for every pair of image and text of the batch; pooling by attention with a learned query."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    vision, text = _towers()
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).train(), _pairs()


def _towers() -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of an image and a text encoder."""
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    text = {**shared, "vocab_size": 128, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1}
    return vision, text


def _pairs() -> Batch:
    """Images and texts of uneven lengths, padded."""
    generator = _generator()
    images, tokens = torch.randn(SAMPLES, 3, 16, 16, generator=generator), torch.randint(3, 128, (SAMPLES, 16), generator=generator)
    seen = torch.arange(16) < torch.tensor([16, 9, 5, 12])[:, None]
    tokens = torch.where(seen, tokens, 2)
    return {"pixel_values": images, "input_ids": tokens, "attention_mask": seen.long(), "return_loss": True}


def video_cnn() -> Example:
    """3D convolutions over time and space, batch normalisation, 3D pooling."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(8, 16, (3, 1, 1), padding=(1, 0, 0)),
        nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1)),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    return _Classifier(net).train(), _videos(frames=4)


def videomae() -> Example:
    """Patches over two frames, biases on queries and values alone."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=CLASSES,
    )
    batch = _videos(frames=4)
    return VideoMAEForVideoClassification(config).train(), batch | {"pixel_values": batch["pixel_values"].transpose(1, 2).contiguous()}


def vivit() -> Example:
    """Patches in space and time by a 3D convolution, a class token."""
    from transformers import VivitConfig, VivitForVideoClassification

    torch.manual_seed(0)
    config = VivitConfig(
        image_size=16,
        num_frames=4,
        tubelet_size=[2, 8, 8],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=CLASSES,
    )
    batch = _videos(frames=4)
    return VivitForVideoClassification(config).train(), batch | {"pixel_values": batch["pixel_values"].transpose(1, 2).contiguous()}


def _videos(frames: int) -> Batch:
    """Videos [n, channels, frames, height, width] with a class each."""
    generator = _generator()
    videos = torch.randn(SAMPLES, 3, frames, 16, 16, generator=generator)
    return {"pixel_values": videos, "labels": torch.randint(0, CLASSES, (SAMPLES,), generator=generator)}
