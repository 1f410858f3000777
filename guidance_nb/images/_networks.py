"""Networks for images, by name: U-Nets, and transformers of `diffusers`, behind one interface, and classifiers."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guidance_nb._checks import Count, Share, check_choice, checked, require
from guidance_nb._extras import extra
from guidance_nb._files import Json
from guidance_nb.denoisers import NetworkDenoiser, Parametrisation, check_inputs, record_nfe
from guidance_nb.images._unet import Blocks, UNetBody
from guidance_nb.networks import fourier_features
from guidance_nb.paths import Path, expand_time


class Conditioning(nn.Module):
    "What is asked of an image network as one vector: the label's and, if scale-aware, the scale's (arXiv 2502.12154)."

    def __init__(self, width: int, num_classes: int = 0, scale_aware: bool = False):
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, width)
        self.scale: nn.Sequential | None = None
        if scale_aware:
            last = nn.Linear(width, width)
            nn.init.normal_(last.weight, std=2e-4)
            nn.init.zeros_(last.bias)
            self.scale = nn.Sequential(nn.Linear(16, width), nn.SiLU(), last)

    def forward(self, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        "The vectors `[batch, width]` of labels `[batch]` and scales `[batch]`."
        h = self.label(labels)
        if self.scale is None or scale is None:
            return h
        return h + self.scale(fourier_features(scale / 8))  # scales up to 8 lie within one slow period


def _image_shape(shape: Sequence[int], factor: int, why: str, square: bool = False) -> tuple[int, ...]:
    "The shape of an image that a network can take."
    whole = len(shape) == 3 and all(type(n) is int and n >= 1 for n in shape)
    fine = whole and shape[1] % factor == shape[2] % factor == 0 and (shape[1] == shape[2] or not square)
    allowed = f"(channels, height, width), height and width divisible by {factor}, for {why}"
    require(fine, "shape", tuple(shape), allowed)
    return tuple(shape)


class _ImageNetwork(nn.Module):
    "`net(x, time, labels)`, or `net(x, time, labels, scale)`: the parts of every network for images."

    shape: tuple[int, ...]  # (channels, height, width)
    ask: Conditioning
    output: Callable[[Tensor, Tensor, Tensor], Tensor]  # of data, times counted to a thousand, and what is asked

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        "Output `[batch, channels, height, width]`."
        require(x.shape[1:] == self.shape, "shape of x", tuple(x.shape), f"[batch, {', '.join(map(str, self.shape))}]")
        return self.output(x, 1000 * time, self.ask(labels, scale))


def _zero(net: nn.Module, *ends: str) -> None:
    "Zero the weights of the parts whose name ends so."
    for name, part in net.named_modules():
        if name.endswith(ends):
            for weight in part.parameters():
                nn.init.zeros_(weight)


@checked
class UNet(_ImageNetwork):
    """ADM's U-Net (arXiv 2105.05233), as `diffusers` has it: `net(x, time, labels)`, or `net(x, time, labels, scale)`.

    Residual blocks with FiLM, h <- norm(h) (1 + gamma) + beta, whose last convolutions start at zero as ADM's do.
    """

    def __init__(
        self,
        shape: Sequence[int],  # (channels, height, width) of an image
        num_classes: int = 0,  # Number of classes; label `num_classes` is the null label
        scale_aware: bool = False,  # Whether a guidance scale is a fourth input
        patch: Count = 1,  # Side of the patches that become the channels of one pixel
        dropout: Share = 0.0,  # Dropout inside the residual blocks
        *,
        widths: Sequence[int],  # Channels of each level; every next level halves the map
        blocks: Count,  # Residual blocks of a level on the way down; one more on the way up
        attention: Sequence[int] = (),  # Heights of the maps with attention; any also puts it in the middle
        head: Count = 64,  # Channels of an attention head
        film: bool = True,  # Whether the conditioning scales and shifts, or is merely added
    ):
        super().__init__()
        fine = widths and not any(width < 1 or width % 4 or (attention and width % head) for width in widths)
        require(fine, "widths", widths, f"multiples of 4, and of head = {head} where there is attention")
        factor, why = patch * 2 ** (len(widths) - 1), f"patch {patch} and {len(widths)} levels"
        self.shape, self.patch = _image_shape(shape, factor, why), patch
        self.ask = Conditioning(4 * widths[0], num_classes, scale_aware)
        groups = math.gcd(32, math.gcd(*widths) // 4)  # of four channels at least
        config = Blocks(4 * widths[0], groups, film, dropout, head)
        attends = [shape[1] // patch >> level in attention for level in range(len(widths))]
        self.net = UNetBody(shape[0] * patch**2, widths, blocks, attends, config)
        _zero(self.net, "conv2", "to_out.0", "conv_out")

    def output(self, x: Tensor, time: Tensor, asked: Tensor) -> Tensor:
        "Output of patches."
        patches = nn.functional.pixel_unshuffle(x, self.patch)
        return nn.functional.pixel_shuffle(self.net(patches, time, asked), self.patch)


class _Given(nn.Module):
    "Stands for an embedder whose work is done: hands back the conditioning."

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return class_labels


def _lay_out(embed: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
    "Tokens in memory as later blocks have theirs, so that a compiled block serves the first, too."
    return tokens.contiguous()


@checked
class DiT(_ImageNetwork):
    """The transformer of DiT and SiT (arXiv 2212.09748) by `diffusers`: `net(x, time, labels)`, or with `scale`.

    Its embedders are ours, and it is initialised as the paper says: every block starts as the identity.
    """

    def __init__(
        self,
        shape: Sequence[int],  # (channels, height, width) of an image or a latent; square
        num_classes: int = 0,  # Number of classes; label `num_classes` is the null label
        scale_aware: bool = False,  # Whether a guidance scale is a fourth input
        width: Count = 384,  # Width of the tokens
        depth: Count = 12,  # Number of blocks
        heads: Count = 6,  # Number of attention heads
        patch: Count = 2,  # Side of the patches that become tokens
        dropout: Share = 0.0,  # Dropout inside the blocks
    ):
        with extra("diffusers"):
            from diffusers import DiTTransformer2DModel
            from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        self.shape = _image_shape(shape, patch, f"patch {patch}, and square, for a transformer", square=True)
        require(width % (4 * heads) == 0, "width", width, f"multiples of 4 and of heads = {heads}")
        self.sines, self.clock = Timesteps(256, True, 0), TimestepEmbedding(256, width)
        self.ask = Conditioning(width, num_classes, scale_aware)
        options: Json = {"in_channels": shape[0], "sample_size": shape[1], "patch_size": patch, "num_layers": depth}
        options |= {"num_attention_heads": heads, "attention_head_dim": width // heads, "dropout": dropout}
        self.net = DiTTransformer2DModel(num_embeds_ada_norm=1, **options)
        self.net.pos_embed.register_forward_hook(_lay_out)
        for block in self.net.transformer_blocks:
            block.norm1.emb = _Given()
        for name, weight in self.net.named_parameters():
            nn.init.zeros_(weight) if name.endswith("bias") else nn.init.xavier_uniform_(weight.flatten(1))
        _zero(self.net, "norm1.linear", "proj_out_1", "proj_out_2")
        for weight in (self.clock.linear_1.weight, self.clock.linear_2.weight, self.ask.label.weight):
            nn.init.normal_(weight, std=0.02)

    def output(self, x: Tensor, time: Tensor, asked: Tensor) -> Tensor:
        "Output of tokens."
        return self.net(x, time, self.clock(self.sines(time).to(x.dtype)) + asked, return_dict=False)[0]


_UNET = {"head": 64, "film": True, "attention": (), "dropout": 0.0, "patch": 1}
_CIFAR10 = {"widths": (128, 256, 256, 256), "film": False, "attention": (16,), "dropout": 0.1}
IMAGE_NETWORKS: dict[str, Json] = {
    "unet-tiny": _UNET | {"widths": (16,), "blocks": 1, "patch": 4},
    "unet-small": _UNET | {"widths": (32, 64), "blocks": 1, "patch": 2},
    "unet-mnist": _UNET | {"widths": (128, 256), "blocks": 2},
    "unet-cifar10": _UNET | _CIFAR10 | {"blocks": 2},
    "unet-cifar10-deep": _UNET | _CIFAR10 | {"blocks": 4},
} | {
    f"dit-{size}/{patch}": {"width": width, "depth": depth, "heads": heads, "dropout": 0.0, "patch": patch}
    for size, width, depth, heads in (("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16), ("xl", 1152, 28, 16))
    for patch in (2, 4, 8)
}


def change_settings(name: str, allowed: Collection[str], changes: Mapping[str, object]) -> Json:
    "The settings of a name with some changed."
    settings = IMAGE_NETWORKS.get(check_choice("name", name, allowed), {})
    return settings | {check_choice("setting", key, settings): value for key, value in changes.items()}


def build_network(
    name: str, shape: Sequence[int], num_classes: int, scale_aware: bool = False, seed: int = 0, **changes: object
) -> nn.Module:
    """A network for images by name, with its own seed for the weights.

    It is called as `net(x, time, labels)`, or as `net(x, time, labels, scale)` if it is scale-aware. The label
    `num_classes` is the null label.
    """
    settings = change_settings(name, IMAGE_NETWORKS, changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (UNet if "widths" in settings else DiT)(shape, num_classes, scale_aware, **settings)


def image_denoiser(
    name: str,  # One of `IMAGE_NETWORKS`
    shape: Sequence[int],  # (channels, height, width) of an image
    path: Path,  # Path to train on
    num_classes: int,  # Number of classes
    prediction: Parametrisation = "velocity",  # What the network predicts
    scale_aware: bool = False,  # Whether the network takes a guidance scale
    seed: int = 0,  # Seed of the initial weights
    **changes: object,  # Settings that differ from those of the name
) -> NetworkDenoiser:  # An untrained model
    "A denoiser of images by the name of its network."
    net = build_network(name, shape, num_classes, scale_aware, seed, **changes)
    return NetworkDenoiser(net, path, num_classes, prediction, scale_aware=scale_aware)


class _UNetEncoder(UNet):
    "The way down of a `UNet`, pooled: `encoder(x, time)` gives `[batch, widths[-1]]`; same arguments as `UNet`."

    def __init__(self, shape: Sequence[int], **settings: Any):
        super().__init__(shape, **settings)
        self.width = settings["widths"][-1]
        self.norm = nn.GroupNorm(self.net.conv_norm_out.num_groups, self.width)
        del self.ask, self.net.up_blocks, self.net.conv_norm_out, self.net.conv_out

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        "Features `[batch, widths[-1]]`."
        e = self.net.time_embedding(1000 * time)
        h, _ = self.net.descend(nn.functional.pixel_unshuffle(x, self.patch), e)
        return nn.functional.silu(self.norm(h)).mean((2, 3))


class ImageClassifier(nn.Module):
    "Logits `[batch, num_classes]` of noisy images, `classifier(x, t)`; U-Nets see x alpha / (alpha^2 + sigma^2)."

    def __init__(
        self,
        name: str,  # "linear" (arXiv 2503.10638), or the U-Net of `IMAGE_NETWORKS` whose encoder to use
        shape: Sequence[int],  # (channels, height, width) of an image
        num_classes: int,  # Number of classes
        path: Path,  # Path of the noisy data
        seed: int = 0,  # Seed of the initial weights
        **changes: object,  # Settings that differ from those of the name
    ):
        super().__init__()
        self.path, self.num_classes = path, num_classes
        known = ["linear", *(key for key, value in IMAGE_NETWORKS.items() if "widths" in value)]
        settings = change_settings(name, known, changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = _UNetEncoder(shape, **settings) if settings else None
            self.head = nn.Linear(self.encoder.width if self.encoder else math.prod(shape) + 1, num_classes)
        if self.encoder:
            _zero(self, "head")

    def look(self, x: Tensor, t: Tensor | float) -> Tensor:
        "The same as `features`, not counted: to evaluate samples is no part of drawing them."
        t = check_inputs(x, t, None, self.num_classes).to(x.device, x.dtype).expand(len(x))
        if self.encoder is None:
            return torch.cat([x.flatten(1), t[:, None]], 1).to(self.head.weight.dtype)
        scaled = x * expand_time(self.path.alpha(t) / (self.path.alpha(t) ** 2 + self.path.sigma(t) ** 2), x)
        return self.encoder(scaled.to(self.head.weight.dtype), t.to(self.head.weight.dtype))

    def features(self, x: Tensor, t: Tensor | float) -> Tensor:
        "What the last layer sees, `[batch, features]`: pooled maps, or for the linear one the pixels and the time."
        record_nfe(len(x))
        return self.look(x, t)

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        "Logits `[batch, num_classes]` at noisy images `x` `[batch, channels, height, width]`, time `t`."
        return self.head(self.features(x, t)).to(x.dtype)
