"""The X-ViT: a convolutional stem, blocks that mix tokens at linear cost, class attention, and a table of sizes.

Shapes: B the batch, C the width, (H, W) an image's size in pixels, (h, w) its grid of tokens, N = h * w. The sizes follow
the grid that XCiT published (El-Nouby et al., arXiv:2106.09681), because the tables of the X-ViT paper (arXiv:2205.13805)
could not be read. This file works when it is copied out together with attention.py.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import MLP, Conv2dNormActivation, StochasticDepth

from .attention import XNormAttention


class ConvStem(nn.Sequential):
    """Image to tokens by 3x3 convolutions of stride 2: (B, 3, H, W) -> (B, dim, H / stride, W / stride).

    log2(stride) convolutions, each with BatchNorm, GELU between them; the width doubles at each, up to `dim`.
    Raises ValueError if `stride` is not 2, 4, 8 or 16 or does not leave the first convolution a whole width.
    Source: Xiao et al., arXiv:2106.14881, in the form of XCiT, arXiv:2106.09681.
    """

    def __init__(self, dim, stride):
        if stride not in (2, 4, 8, 16):
            raise ValueError(
                f"got a stem stride of {stride!r}, expected 2, 4, 8 or 16 pixels a token"
            )
        steps = stride.bit_length() - 1
        if dim % 2 ** (steps - 1):
            raise ValueError(
                f"got dim={dim} and a stem stride of {stride}, expected a multiple of {2 ** (steps - 1)}: "
                "the stem doubles its width at each of its convolutions"
            )
        widths = [3] + [dim // 2**n for n in reversed(range(steps))]
        super().__init__(
            *(
                Conv2dNormActivation(
                    a,
                    b,
                    kernel_size=3,
                    stride=2,
                    activation_layer=nn.GELU if n < steps else None,
                    inplace=None,
                )
                for n, (a, b) in enumerate(zip(widths, widths[1:]), start=1)
            )
        )


class LocalPatchInteraction(nn.Module):
    """Mixes each token with its neighbours on the grid, channel by channel: (B, N, C) and the grid (h, w) -> (B, N, C).

    Two depthwise 3x3 convolutions with GELU and BatchNorm between them. Source: XCiT, arXiv:2106.09681.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, grid):
        x = x.mT.unflatten(2, grid)  # (B, C, h, w)
        x = self.conv2(self.norm(F.gelu(self.conv1(x))))  # (B, C, h, w)
        return x.flatten(2).mT  # (B, N, C)


class LayerScale(nn.Module):
    """One learnable factor for each channel, all equal to `init` at the start. Source: CaiT, arXiv:2103.17239."""

    def __init__(self, dim, init):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return self.scale * x


class XViTBlock(nn.Module):
    """Attention, local patch interaction, feed-forward, in this order: (B, N, C) and the grid (h, w) -> (B, N, C).

    Each part sees its input through a LayerNorm and is added to it through a LayerScale; in training, stochastic depth
    leaves a part out for an image with probability `drop_path`. `attention`: a class with the constructor
    (dim, num_heads). `lpi=False` leaves the local patch interaction out.
    """

    def __init__(
        self, dim, num_heads, attention=XNormAttention, lpi=True, drop_path=0.0, layer_scale=1.0
    ):
        super().__init__()
        self.attention = _Residual(dim, attention(dim, num_heads), drop_path, layer_scale)
        self.lpi = (
            _Residual(dim, LocalPatchInteraction(dim), drop_path, layer_scale) if lpi else None
        )
        self.mlp = _Residual(dim, _mlp(dim), drop_path, layer_scale)

    def forward(self, x, grid):
        x = x + self.attention(x)  # (B, N, C): every token with every token
        if self.lpi is not None:
            x = x + self.lpi(x, grid)  # (B, N, C): every token with its neighbours
        return x + self.mlp(x)  # (B, N, C): every token by itself


class ClassAttentionBlock(nn.Module):
    """The class token reads the image: (B, 1, C) and tokens (B, N, C) -> (B, 1, C); the tokens stay as they are.

    The attention is the module of every other block, put to the class token and the tokens together; of its output only
    the class token's row is kept. Source: class attention as in CaiT, arXiv:2103.17239, without its softmax.
    """

    def __init__(self, dim, num_heads, attention=XNormAttention, drop_path=0.0, layer_scale=1.0):
        super().__init__()
        self.attention = _Residual(dim, attention(dim, num_heads), drop_path, layer_scale)
        self.mlp = _Residual(dim, _mlp(dim), drop_path, layer_scale)

    def forward(self, class_token, tokens):
        together = torch.cat([class_token, tokens], dim=1)  # (B, 1 + N, C)
        class_token = class_token + self.attention(together)[:, :1]  # (B, 1, C)
        return class_token + self.mlp(class_token)  # (B, 1, C)


class XViT(nn.Module):
    """The whole model: images (B, 3, H, W) as floats -> (B, num_classes), the logits.

    `img_size`: the side, or (height, width), whose grid the learnable positions have; images of any other size work too,
    in training and later: the positions are interpolated. A side that is no multiple of `stem_stride` is padded with
    zeros at its end. `attention`: a class with the constructor (dim, num_heads) for (B, N, C) -> (B, N, C), in every
    block. `class_depth`: how many class-attention blocks follow; with 0 the mean over the tokens takes their place.
    `layer_scale`: where LayerScale starts; by default 1 up to a depth of 12 and 1e-5 above, as in XCiT.
    In training a batch needs two tokens at least: BatchNorm refuses a lone one, for it has no variance.
    Raises ValueError if the sizes do not fit together or an input is no batch of RGB images.
    """

    def __init__(
        self,
        img_size=224,
        num_classes=1000,
        dim=384,
        depth=12,
        num_heads=8,
        stem_stride=16,
        attention=XNormAttention,
        class_depth=2,
        lpi=True,
        drop_path=0.0,
        layer_scale=None,
    ):
        super().__init__()
        self.stem = ConvStem(dim, stem_stride)
        self.stem_stride = stem_stride
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = math.ceil(height / stem_stride), math.ceil(width / stem_stride)
        self.positions = nn.Parameter(torch.zeros(1, dim, *grid))
        inside = dict(
            attention=attention,
            drop_path=drop_path,
            layer_scale=layer_scale if layer_scale is not None else 1.0 if depth <= 12 else 1e-5,
        )
        self.blocks = nn.ModuleList(
            XViTBlock(dim, num_heads, lpi=lpi, **inside) for _ in range(depth)
        )
        self.class_blocks = nn.ModuleList(
            ClassAttentionBlock(dim, num_heads, **inside) for _ in range(class_depth)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_depth else None
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.apply(_initialize)
        for parameter in (self.positions, self.class_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward_features(self, x, taps=()):
        """Images (B, 3, H, W) -> the grid of tokens (B, C, h, w), h = ⌈H / stride⌉, w = ⌈W / stride⌉, before any pooling.

        With `taps`, numbers of blocks from 1 on, a list of the grids after those blocks: what a pyramid is built from."""
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise ValueError(
                f"got {x.dtype} of shape {tuple(x.shape)}, expected float images (batch, 3, height, width): "
                "scale bytes to floats with data.normalize, repeat grey three times, add the batch axis"
            )
        x = F.pad(x, (0, -x.shape[3] % self.stem_stride, 0, -x.shape[2] % self.stem_stride))
        x = self.stem(x)  # (B, C, h, w)
        grid = x.shape[2:]
        positions = self.positions
        if grid != positions.shape[2:]:
            positions = F.interpolate(
                positions, size=grid, mode="bicubic", align_corners=False
            )  # (1, C, h, w)
        x = (x + positions).flatten(2).mT  # (B, N, C)
        after = {}
        for n, block in enumerate(self.blocks, start=1):
            x = block(x, grid)
            if n in taps:
                after[n] = x.mT.unflatten(2, grid)  # (B, C, h, w)
        if taps:
            return [after[n] for n in taps]
        return x.mT.unflatten(2, grid)  # (B, C, h, w)

    def forward(self, x):
        tokens = self.forward_features(x).flatten(2).mT  # (B, N, C)
        if self.class_token is None:
            return self.head(self.norm(tokens).mean(1))  # (B, num_classes)
        class_token = self.class_token.expand(tokens.shape[0], -1, -1)  # (B, 1, C)
        for block in self.class_blocks:
            class_token = block(class_token, tokens)
        return self.head(self.norm(class_token[:, 0]))  # (B, num_classes)


SIZES = {  # pico and nano are for images of 32 pixels, the others have XCiT's widths, depths and heads
    "xvit_pico": dict(
        dim=64, depth=4, num_heads=4, stem_stride=4, class_depth=1, img_size=32, num_classes=10
    ),
    "xvit_nano": dict(
        dim=192, depth=7, num_heads=4, stem_stride=2, class_depth=1, img_size=32, num_classes=10
    ),
    "xvit_tiny": dict(dim=192, depth=24, num_heads=4),
    "xvit_small": dict(dim=384, depth=12, num_heads=8),
    "xvit_medium": dict(dim=384, depth=24, num_heads=8),
    "xvit_base": dict(dim=512, depth=24, num_heads=8),
}
xvit_pico = partial(XViT, **SIZES["xvit_pico"])
xvit_nano = partial(XViT, **SIZES["xvit_nano"])
xvit_tiny = partial(XViT, **SIZES["xvit_tiny"])
xvit_small = partial(XViT, **SIZES["xvit_small"])
xvit_medium = partial(XViT, **SIZES["xvit_medium"])
xvit_base = partial(XViT, **SIZES["xvit_base"])


def cost(model, img_size):
    """(parameters, multiply-adds) of any image model for one image; img_size is its side, or (height, width).

    Multiply-adds are those of its matrix products and convolutions, as PyTorch's FlopCounterMode counts them, halved.
    """
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)  # shapes without numbers
    with FlopCounterMode(display=False) as counter:
        shadow(
            torch.empty(
                1,
                3,
                *((img_size, img_size) if isinstance(img_size, int) else img_size),
                device="meta",
            )
        )
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


class _Residual(nn.Module):
    """What a block adds to its input: LayerNorm, one part, LayerScale, stochastic depth."""

    def __init__(self, dim, part, drop_path, layer_scale):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.part = part
        self.scale = LayerScale(dim, layer_scale)
        self.drop = StochasticDepth(drop_path, "row")

    def forward(self, x, *rest):
        return self.drop(self.scale(self.part(self.norm(x), *rest)))


def _mlp(dim):
    return MLP(dim, [4 * dim, dim], activation_layer=nn.GELU, inplace=None)


def _initialize(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
