"""The maps of ADM's U-Net (arXiv 2105.05233), number for number those of `diffusers`' `UNet2DModel`, names included.

It is written out here because importing `diffusers` takes longer than drawing a hundred digits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guidance_nb._extras import extra
from guidance_nb._layers import Layer


@dataclass(frozen=True)
class Blocks:
    """What all blocks of a U-Net have in common."""

    time: int  # Numbers of the conditioning vector
    groups: int  # Groups of every normalisation
    film: bool  # Whether the vector scales and shifts, or is merely added
    dropout: float
    head: int  # Channels of an attention head

    def attend(self, width: int) -> Layer:
        """A layer of attention, of `diffusers`, as the methods know it that change attention."""
        with extra("diffusers"):
            from diffusers.models.attention_processor import Attention

        options = {"residual_connection": True, "bias": True, "upcast_softmax": True, "norm_num_groups": self.groups}
        heads = width // self.head
        return Attention(width, heads=heads, dim_head=self.head, _from_deprecated_attn_block=True, **options)


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is led, conditioned in between."""

    def __init__(self, before: int, after: int, config: Blocks):
        super().__init__()
        self.film = config.film
        self.norm1, self.conv1 = nn.GroupNorm(config.groups, before), nn.Conv2d(before, after, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time, 2 * after if config.film else after)
        self.norm2, self.dropout = nn.GroupNorm(config.groups, after), nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Maps `[batch, after, height, width]` from maps and conditioning vectors `[batch, time]`."""
        y = self.conv1(nn.functional.silu(self.norm1(h)))
        moved = self.time_emb_proj(nn.functional.silu(e))[:, :, None, None]
        if self.film:
            gamma, beta = moved.chunk(2, 1)
            y = self.norm2(y) * (1 + gamma) + beta
        else:
            y = self.norm2(y + moved)
        y = self.conv2(self.dropout(nn.functional.silu(y)))
        return (h if self.conv_shortcut is None else self.conv_shortcut(h)) + y


class Resample(nn.Module):
    """A convolution that halves maps, or doubles them."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """Maps of another size."""
        return self.conv(nn.functional.interpolate(h, scale_factor=2.0) if self.up else h)


class Stage(nn.Module):
    """Residual blocks of one size, with or without attention behind them, and a change of size."""

    gradient_checkpointing = False

    def __init__(
        self, inputs: Sequence[int], after: int, attention: int, config: Blocks, way: str, resize: bool = False
    ):
        super().__init__()
        blocks, layers = nn.ModuleList(), nn.ModuleList()
        for number, before in enumerate(inputs):  # in the order in which diffusers draws weights
            blocks.append(ResidualBlock(before, after, config))
            if number < attention:
                layers.append(config.attend(after))
        self.attentions, self.resnets, self.way = layers, blocks, way
        if resize:
            setattr(self, f"{way}samplers", nn.ModuleList([Resample(after, way == "up")]))

    def forward(self, h: Tensor, e: Tensor, skips: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps after this stage, and `skips` with those of the way down, or without those that the way up has used."""
        skips = [*skips]  # the caller's stays, for a stage may be computed again
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.resnets):
            h = torch.cat([h, skips.pop()], 1) if self.way == "up" else h
            h = checkpoint(block, h, e, use_reentrant=False) if recompute else block(h, e)
            h = self.attentions[number](h) if number < len(self.attentions) else h
            if self.way == "down":
                skips.append(h)
        for part in getattr(self, f"{self.way}samplers", ()):
            h = part(h)
            if self.way == "down":
                skips.append(h)
        return h, skips


class TimeEmbedding(nn.Module):
    """A perceptron of sines and cosines of the time."""

    def __init__(self, sines: int, time: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(sines, time), nn.Linear(time, time)

    def forward(self, time: Tensor) -> Tensor:
        """Vectors `[batch, time]` of times `[batch]`, counted to a thousand."""
        half = self.linear_1.in_features // 2
        rates = (-math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / half).exp()
        angles = time[:, None].float() * rates
        sines = torch.cat([angles.cos(), angles.sin()], 1).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(sines)))


class UNetBody(nn.Module):
    """The whole U-Net but its conditioning: `body(x, time, asked)`, with times counted to a thousand."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, attention: Sequence[bool], config: Blocks):
        super().__init__()
        first, last, levels = widths[0], widths[-1], len(widths)
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, config.time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [first]
        for level, wide in enumerate(widths):
            inputs, more = [skips[-1], *[wide] * (blocks - 1)], level < levels - 1
            self.down_blocks.append(Stage(inputs, wide, blocks * attention[level], config, "down", more))
            skips += [wide] * (blocks + more)
        middle, before = Stage([last, last], last, int(any(attention)), config, "middle"), last
        for level in reversed(range(levels)):
            wide = widths[level]
            inputs = [(before if n == 0 else wide) + skips.pop() for n in range(blocks + 1)]
            self.up_blocks.append(Stage(inputs, wide, (blocks + 1) * attention[level], config, "up", level > 0))
            before = wide
        self.mid_block = middle
        self.conv_norm_out = nn.GroupNorm(config.groups, first)
        self.conv_out = nn.Conv2d(first, channels, 3, padding=1)

    def enable_gradient_checkpointing(self) -> None:
        """Let residual blocks compute their activations again in the backward pass."""
        for part in self.modules():
            if isinstance(part, Stage):
                part.gradient_checkpointing = True

    def descend(self, x: Tensor, e: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The smallest maps, and those on the way."""
        h = self.conv_in(x)
        skips = [h]
        for stage in [*self.down_blocks, self.mid_block]:
            h, skips = stage(h, e, skips)
        return h, skips

    def forward(self, x: Tensor, time: Tensor, asked: Tensor) -> Tensor:
        """Output, shaped as `x`."""
        e = self.time_embedding(time) + asked
        h, skips = self.descend(x, e)
        for stage in self.up_blocks:
            h, skips = stage(h, e, skips)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(h)))
