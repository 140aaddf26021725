"""Small diffusion models, each with a batch: U-Nets, transformers, autoencoders.

Every function returns (model, batch), seeded; `model(**batch)` is the loss. Noise and time are inputs, or drawn in the forward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "autoencoder_kl",
    "cogview",
    "consistency",
    "ddpm",
    "diffusion_transformer",
    "dit",
    "flux",
    "pixart",
    "rectified_flow",
    "sana",
    "stable_diffusion",
    "stable_diffusion3",
    "transformer_2d",
    "unet_2d",
    "uvit",
    "wan_video",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

SAMPLES, STEPS = 4, 1000


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _noise(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=_generator())


def _times() -> Tensor:
    return torch.randint(0, STEPS, (SAMPLES,), generator=_generator())


class Denoiser(nn.Module):
    """Squared error of what a network of diffusers predicts; all other inputs are handed on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, target: Tensor, **inputs: Any) -> Tensor:
        return F.mse_loss(self.net(**inputs, return_dict=False)[0], target)


def _denoiser(net: nn.Module, **inputs: Tensor) -> Example:
    """The network, trained to predict noise of the shape of its first input."""
    first = next(iter(inputs.values()))
    target = torch.randn(first.shape, generator=torch.Generator().manual_seed(2))
    return Denoiser(net).train(), {**inputs, "target": target}


# U-Nets.


def unet_2d() -> Example:
    """Residual blocks with group normalisation and time, attention at the coarse level."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return _denoiser(net, sample=_noise(3, 16, 16), timestep=_times())


def stable_diffusion() -> Example:
    """Cross attention of the image's tokens to a text, gated feed-forward; dropout."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=4,
        dropout=0.1,
    )
    return _denoiser(net, sample=_noise(4, 16, 16), timestep=_times(), encoder_hidden_states=_noise(8, 32))


def uvit() -> Example:
    """Tokens of an image, masked, to their distribution: convolutions around a transformer; cross entropy over all places."""
    from diffusers import UVit2DModel

    torch.manual_seed(0)
    net = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=32,
        vocab_size=64,
        codebook_size=60,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        sample_size=8,
    )
    generator = _generator()
    labels = torch.randint(0, 60, (SAMPLES, 8, 8), generator=generator)
    hidden = torch.rand(SAMPLES, 8, 8, generator=generator) < torch.tensor([0.9, 0.5, 0.3, 0.7])[:, None, None]
    batch = {
        "input_ids": torch.where(hidden, 63, labels),
        "encoder_hidden_states": _noise(8, 32),
        "pooled_text_emb": _noise(16),
        "micro_conds": torch.rand(SAMPLES, 5, generator=generator),
        "labels": torch.where(hidden, labels, -100),
    }
    return MaskedImage(net).train(), batch


class MaskedImage(nn.Module):
    """Cross entropy of the hidden tokens."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return F.cross_entropy(self.net(**inputs), labels)


class ResidualBlock(nn.Module):
    """Two convolutions; the time scales and shifts between them."""

    def __init__(self, before: int, after: int, wide: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.time = nn.Linear(wide, 2 * after)
        self.norm = nn.GroupNorm(4, after)
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[..., None, None].chunk(2, 1)
        return self.skip(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class TinyUnet(nn.Module):
    """Predicts the noise in x at time t."""

    def __init__(self, channels: int = 16, wide: int = 32) -> None:
        super().__init__()
        self.wide = wide
        self.time = nn.Sequential(nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down = ResidualBlock(channels, channels, wide)
        self.shrink = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.middle = ResidualBlock(2 * channels, 2 * channels, wide)
        self.up = ResidualBlock(3 * channels, channels, wide)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(_waves(t, self.wide))
        fine = self.down(self.first(x), time)
        coarse = self.middle(self.shrink(fine), time)
        opened = F.interpolate(coarse, scale_factor=2, mode="nearest")
        return self.last(self.up(torch.cat([opened, fine], 1), time))


def _waves(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of t [n] with geometrically growing periods, [n, size]."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(size // 2, device=t.device) / (size // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Ddpm(nn.Module):
    """Draws a time and noise for each image, and predicts the noise."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyUnet()
        self.register_buffer("kept", torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS), 0))

    def forward(self, images: Tensor) -> Tensor:
        t = torch.randint(0, STEPS, (len(images),), device=images.device)
        noise = torch.randn_like(images)
        kept = self.kept[t][:, None, None, None]
        return F.mse_loss(self.net(kept.sqrt() * images + (1 - kept).sqrt() * noise, t), noise)


def ddpm() -> Example:
    """Draws noise and times in the forward pass (torch.randn_like, torch.randint); dropout."""
    torch.manual_seed(0)
    return Ddpm().train(), {"images": _noise(3, 16, 16)}


class Consistency(nn.Module):
    """Two neighbouring times of one path must give one image; the second network is the first, without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyUnet()

    def _clean(self, x: Tensor, sigma: Tensor) -> Tensor:
        scale = 0.25 / (sigma.square() + 0.25)
        return scale * x + (1 - scale) * self.net(x, 250 * sigma.flatten().log())

    def forward(self, images: Tensor, sigmas: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        low, high = (each[:, None, None, None] for each in sigmas.unbind(1))
        guess = self._clean(images + high * noise, high)
        with torch.no_grad():
            target = self._clean(images + low * noise, low)
        difference = (guess - target).square().flatten(1).sum(1)
        return ((difference + 0.01).sqrt() / (high - low).flatten()).mean()


def consistency() -> Example:
    """The network is run twice, once without gradient; noise is drawn; a weight for each sample."""
    torch.manual_seed(0)
    low = 0.1 + torch.rand(SAMPLES, generator=_generator())
    return Consistency().train(), {"images": _noise(3, 16, 16), "sigmas": torch.stack([low, 1.2 * low], 1)}


# Transformers.


def dit() -> Example:
    """Classes and times modulate every layer (adaptive norm); classes are dropped at random for guidance."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=STEPS
    )
    classes = torch.randint(0, 10, (SAMPLES,), generator=_generator())
    return _denoiser(net, hidden_states=_noise(4, 8, 8), timestep=_times(), class_labels=classes)


def transformer_2d() -> Example:
    """The transformer inside a U-Net: group normalisation, tokens from pixels, cross attention, gated feed-forward."""
    from diffusers import Transformer2DModel

    torch.manual_seed(0)
    net = Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=2, norm_num_groups=8, cross_attention_dim=16
    )
    return _denoiser(net, hidden_states=_noise(32, 8, 8), encoder_hidden_states=_noise(6, 16))


def pixart() -> Example:
    """One modulation from the time shared by all layers, a masked text."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    net = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    seen = (torch.arange(6) < torch.tensor([6, 3, 5, 2])[:, None]).long()
    return _denoiser(
        net, hidden_states=_noise(4, 8, 8), encoder_hidden_states=_noise(6, 16), timestep=_times(), encoder_attention_mask=seen
    )


def stable_diffusion3() -> Example:
    """Two streams, image and text, joined in attention alone."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return _denoiser(
        net, hidden_states=_noise(4, 8, 8), encoder_hidden_states=_noise(6, 16), pooled_projections=_noise(16), timestep=_times()
    )


def flux() -> Example:
    """Two joined streams, then one of parallel layers; rotary positions over three axes; guidance as an input."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    model, batch = _denoiser(
        net,
        hidden_states=_noise(16, 8),
        encoder_hidden_states=_noise(6, 16),
        pooled_projections=_noise(16),
        timestep=_times() / STEPS,
        guidance=torch.full((SAMPLES,), 3.5),
    )
    return Placed(model).train(), batch


class Placed(nn.Module):
    """Adds the positions of text and image tokens, the same for every sample."""

    places: Tensor
    words: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        self.register_buffer("places", torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1))
        self.register_buffer("words", torch.zeros(6, 3))

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch, img_ids=self.places, txt_ids=self.words)


def cogview() -> Example:
    """Text and image in one sequence with modulations of their own; sizes and crops as conditions."""
    from diffusers import CogView4Transformer2DModel

    torch.manual_seed(0)
    net = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    size = torch.tensor([[64.0, 64.0]]).repeat(SAMPLES, 1)
    return _denoiser(
        net,
        hidden_states=_noise(4, 8, 8),
        encoder_hidden_states=_noise(6, 16),
        timestep=_times(),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(SAMPLES, 2),
    )


def sana() -> Example:
    """Linear attention (sums of keys times values), gated depthwise convolutions as feed-forward."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )
    return _denoiser(net, hidden_states=_noise(4, 8, 8), encoder_hidden_states=_noise(6, 16), timestep=_times())


def wan_video() -> Example:
    """Video: patches by a 3D convolution, rotary positions over time, height and width, norms of whole queries and keys."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    net = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return _denoiser(net, hidden_states=_noise(4, 2, 8, 8), timestep=_times(), encoder_hidden_states=_noise(6, 16))


class AdaptiveBlock(nn.Module):
    """A transformer layer whose norms are scaled, shifted and gated by a condition; gates begin near zero."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        gates = nn.Linear(hidden, 6 * hidden)
        nn.init.normal_(gates.weight, std=0.02)
        self.modulation = nn.Sequential(nn.SiLU(), gates)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        normed = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(attended)
        return x + gate2 * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2)


class DiffusionTransformer(nn.Module):
    """Predicts noise from patches; classes are dropped at random, so that one network serves with and without them."""

    def __init__(self, hidden: int = 64, layers: int = 2, classes: int = 10, patch: int = 4, patches: int = 16) -> None:
        super().__init__()
        self.hidden, self.patch, self.nothing = hidden, patch, classes
        self.embed = nn.Conv2d(3, hidden, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, hidden))
        self.classes = nn.Embedding(classes + 1, hidden)
        self.time = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(AdaptiveBlock(hidden, 4) for _ in range(layers))
        self.head = nn.Linear(hidden, 3 * patch * patch)

    def forward(self, images: Tensor, classes: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        angle = (t * math.pi / 2)[:, None, None, None]
        x = self.embed(angle.cos() * images + angle.sin() * noise).flatten(2).transpose(1, 2) + self.positions
        dropped = torch.rand(len(classes), device=classes.device) < 0.1
        condition = self.classes(torch.where(dropped, self.nothing, classes)) + self.time(_waves(1000 * t, self.hidden))
        for block in self.blocks:
            x = block(x, condition)
        made = F.fold(self.head(x).transpose(1, 2), images.shape[-2:], self.patch, stride=self.patch)
        return F.mse_loss(made, noise)


def diffusion_transformer() -> Example:
    """Adaptive norms, random numbers of one per sample (torch.rand), patches put together by fold."""
    torch.manual_seed(0)
    generator = _generator()
    batch = {
        "images": torch.randn(SAMPLES, 3, 16, 16, generator=generator),
        "classes": torch.randint(0, 10, (SAMPLES,), generator=generator),
        "t": torch.rand(SAMPLES, generator=generator),
        "noise": torch.randn(SAMPLES, 3, 16, 16, generator=generator),
    }
    return DiffusionTransformer().train(), batch


class RectifiedFlow(nn.Module):
    """Predicts the velocity from noise to a point; the time is drawn from a logit-normal distribution."""

    def __init__(self, size: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size + 1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size))

    def forward(self, points: Tensor) -> Tensor:
        t = torch.randn(len(points), 1, device=points.device).sigmoid()
        noise = torch.randn_like(points)
        velocity = self.net(torch.cat([t * points + (1 - t) * noise, t], 1))
        return (velocity - (points - noise)).square().sum(1).mean()


def rectified_flow() -> Example:
    """Flow matching of points: torch.randn and torch.randn_like in the forward pass."""
    torch.manual_seed(0)
    return RectifiedFlow().train(), {"points": _noise(8)}


# Autoencoders.


class Autoencoded(nn.Module):
    """Reconstruction and divergence of diffusers' variational autoencoder."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        posterior = self.autoencoder.encode(images).latent_dist
        made = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        return F.l1_loss(made, images) + 1e-6 * posterior.kl().mean()


def autoencoder_kl() -> Example:
    """Group normalisation, one attention over all pixels; the noise is an input."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    return Autoencoded(net).train(), {"images": _noise(3, 16, 16), "noise": _noise(4, 8, 8)}
