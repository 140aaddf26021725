"""A network of diffusers with the loss it is trained with: the mean squared error of the noise that it finds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """net: takes noisy latents `sample`, `timestep` and more by name, and returns the noise as `.sample`.

    text_embeds, time_ids: what SDXL adds to the time, the pooled text and the image's sizes.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, target: Tensor, text_embeds: Tensor | None = None, time_ids: Tensor | None = None, **inputs: Tensor) -> Tensor:
        added = {} if text_embeds is None else {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}}
        return F.mse_loss(self.net(**inputs, **added).sample, target)
