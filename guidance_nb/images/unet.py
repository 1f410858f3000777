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

__all__: list[str] = []


@dataclass(frozen=True)
class Plan:
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


class Residual(nn.Module):
    """Two convolutions around which the input is led, conditioned in between."""

    def __init__(self, before: int, after: int, plan: Plan):
        super().__init__()
        self.film = plan.film
        self.norm1, self.conv1 = nn.GroupNorm(plan.groups, before), nn.Conv2d(before, after, 3, padding=1)
        self.time_emb_proj = nn.Linear(plan.time, 2 * after if plan.film else after)
        self.norm2, self.dropout = nn.GroupNorm(plan.groups, after), nn.Dropout(plan.dropout)
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


class Resize(nn.Module):
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

    def __init__(self, befores: Sequence[int], after: int, attention: int, plan: Plan, way: str, resize: bool = False):
        super().__init__()
        blocks, layers = nn.ModuleList(), nn.ModuleList()
        for number, before in enumerate(befores):  # in the order in which diffusers draws weights
            blocks.append(Residual(before, after, plan))
            if number < attention:
                layers.append(plan.attend(after))
        self.attentions, self.resnets, self.way = layers, blocks, way
        if resize:
            setattr(self, f"{way}samplers", nn.ModuleList([Resize(after, way == "up")]))

    def forward(self, h: Tensor, e: Tensor, kept: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps after this stage, and `kept` with those of the way down, or without those that the way up has used."""
        kept = [*kept]  # the caller's stays, for a stage may be computed again
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.resnets):
            h = torch.cat([h, kept.pop()], 1) if self.way == "up" else h
            h = checkpoint(block, h, e, use_reentrant=False) if again else block(h, e)
            h = self.attentions[number](h) if number < len(self.attentions) else h
            if self.way == "down":
                kept.append(h)
        for part in getattr(self, f"{self.way}samplers", ()):
            h = part(h)
            if self.way == "down":
                kept.append(h)
        return h, kept


class Clock(nn.Module):
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


class Maps(nn.Module):
    """All stages: `maps(x, time, asked)` with times counted to a thousand, and what is asked of it as vectors."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, attention: Sequence[bool], plan: Plan):
        super().__init__()
        first, last, levels = widths[0], widths[-1], len(widths)
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1)
        self.time_embedding = Clock(first, plan.time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        kept = [first]
        for level, wide in enumerate(widths):
            befores, more = [kept[-1], *[wide] * (blocks - 1)], level < levels - 1
            self.down_blocks.append(Stage(befores, wide, blocks * attention[level], plan, "down", more))
            kept += [wide] * (blocks + more)
        middle, before = Stage([last, last], last, int(any(attention)), plan, "middle"), last
        for level in reversed(range(levels)):
            wide = widths[level]
            befores = [(before if n == 0 else wide) + kept.pop() for n in range(blocks + 1)]
            self.up_blocks.append(Stage(befores, wide, (blocks + 1) * attention[level], plan, "up", level > 0))
            before = wide
        self.mid_block = middle
        self.conv_norm_out = nn.GroupNorm(plan.groups, first)
        self.conv_out = nn.Conv2d(first, channels, 3, padding=1)

    def enable_gradient_checkpointing(self) -> None:
        """Let residual blocks compute their activations again in the backward pass."""
        for part in self.modules():
            if isinstance(part, Stage):
                part.gradient_checkpointing = True

    def descend(self, x: Tensor, e: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The smallest maps, and those on the way."""
        h = self.conv_in(x)
        kept = [h]
        for stage in [*self.down_blocks, self.mid_block]:
            h, kept = stage(h, e, kept)
        return h, kept

    def forward(self, x: Tensor, time: Tensor, asked: Tensor) -> Tensor:
        """Output, shaped as `x`."""
        e = self.time_embedding(time) + asked
        h, kept = self.descend(x, e)
        for stage in self.up_blocks:
            h, kept = stage(h, e, kept)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(h)))
