"""The X-ViT: a convolutional stem, blocks that mix tokens at linear cost, class attention, sizes.

Shapes: B the batch, C the width, (H, W) an image's size in pixels, (h, w) its grid of tokens,
N = h * w. The table of sizes follows the grid that XCiT published (El-Nouby et al.,
arXiv:2106.09681), because the tables of the X-ViT paper (arXiv:2205.13805) could not be read.
This file works when it is copied out together with attention.py.
"""

import copy
import operator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import MLP, Conv2dNormActivation, StochasticDepth

if __package__:
    from .attention import XNormAttention
else:  # copied out, and imported as a file by itself
    from attention import XNormAttention


class ConvStem(nn.Sequential):
    """Image to tokens by 3x3 convolutions of stride 2: (B, 3, H, W) -> (B, dim, h, w).

    log2(stride) convolutions, each with BatchNorm, GELU between them; the width doubles at each, up
    to `dim`. h = H / stride, w = W / stride. Raises ValueError if `stride` is not 2, 4, 8 or 16 or
    does not leave the first convolution a whole width.
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
                f"got dim={dim} and a stem stride of {stride}, expected a multiple of "
                f"{2 ** (steps - 1)}: the stem doubles its width at each of its convolutions"
            )
        widths = [3] + [dim // 2**n for n in reversed(range(steps))]
        layer = partial(Conv2dNormActivation, kernel_size=3, stride=2, inplace=None)
        layers = [layer(a, b, activation_layer=nn.GELU) for a, b in zip(widths, widths[1:-1])]
        super().__init__(*layers, layer(*widths[-2:], activation_layer=None))


class LocalPatchInteraction(nn.Module):
    """Mixes each token with its neighbours on the grid (h, w), channel by channel: (B, N, C).

    Two depthwise 3x3 convolutions with GELU and BatchNorm between them. `padding`: booleans
    (B, 1, h, w), True where a picture has no token. Source: XCiT, arXiv:2106.09681.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, grid, padding=None):
        x = x.mT.unflatten(2, grid)  # (B, C, h, w)
        x = F.gelu(_beside_padding(self.conv1, x, padding))  # (B, C, h, w)
        x = _beside_padding(self.norm, x, padding)  # (B, C, h, w)
        x = _beside_padding(self.conv2, x, padding)  # (B, C, h, w)
        return x.flatten(2).mT  # (B, N, C)


class LayerScale(nn.Module):
    """One learnable factor for each channel, all equal to `init` at the start.

    Source: CaiT, arXiv:2103.17239.
    """

    def __init__(self, dim, init):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return self.scale * x


class XViTBlock(nn.Module):
    """Attention, local patch interaction, feed-forward: (B, N, C) and the grid (h, w) -> (B, N, C).

    Each part sees its input through a LayerNorm and is added to it through a LayerScale; in
    training, stochastic depth leaves a part out for an image with probability `drop_path`.
    `attention`: a class with the constructor (dim, num_heads). `lpi=False` leaves the local patch
    interaction out. `padding`: booleans (B, 1, h, w), True where a picture has no token.
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

    def forward(self, x, grid, padding=None):
        mask = () if padding is None else (padding.flatten(1),)  # (B, N)
        x = x + self.attention(x, *mask)  # (B, N, C): every token with every token
        if self.lpi is not None:
            x = x + self.lpi(x, grid, padding)  # (B, N, C): every token with its neighbours
        return x + self.mlp(x)  # (B, N, C): every token by itself


class ClassAttentionBlock(nn.Module):
    """The class token reads the image: (B, 1, C) and tokens (B, N, C) -> (B, 1, C).

    The attention is the module of every other block, put to the class token and the tokens
    together, of which only the class token asks: the tokens stay as they are. `padding`: booleans
    (B, N), True where a token is padding.
    Source: class attention as in CaiT, arXiv:2103.17239, without its softmax.
    """

    def __init__(self, dim, num_heads, attention=XNormAttention, drop_path=0.0, layer_scale=1.0):
        super().__init__()
        self.attention = _Residual(dim, attention(dim, num_heads), drop_path, layer_scale)
        self.mlp = _Residual(dim, _mlp(dim), drop_path, layer_scale)

    def forward(self, class_token, tokens, padding=None):
        together = torch.cat([class_token, tokens], dim=1)  # (B, 1 + N, C)
        mask = None if padding is None else F.pad(padding, (1, 0), value=False)  # (B, 1 + N)
        class_token = class_token + self.attention(together, mask, 1)  # (B, 1, C): one query
        return class_token + self.mlp(class_token)  # (B, 1, C)


class XViT(nn.Module):
    """The whole model: images (B, 3, H, W) as floats -> (B, num_classes), the logits.

    `img_size`: the side, or (height, width), whose grid the learnable positions have; images of any
    other size work too, in training and later: the positions are interpolated. A side that is no
    multiple of `stem_stride` is padded with zeros at its end. `attention`: a class with the
    constructor (dim, num_heads), in every block; of its forward(x, key_padding_mask, num_queries),
    x (B, N, C), `sizes` needs the second and class attention the third. `class_depth`: how many
    class-attention blocks follow; with 0 the mean over the tokens takes their place. `layer_scale`:
    where LayerScale starts; by default 1 up to a depth of 12 and 1e-5 above, as in XCiT.
    `sizes`, integers (B, 2): each picture's own (height, width), where pictures of different sizes
    share a batch. What lies beyond, at the right and below, is padding: in evaluation a picture's
    logits are those it has alone, and in training BatchNorm's statistics leave padding out.
    In training a batch needs two tokens at least: BatchNorm refuses one, for it has no variance.
    Raises ValueError if sizes or counts do not fit or an input is no batch of RGB images.
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
        _check_counts(num_classes=num_classes, dim=dim, depth=depth, class_depth=class_depth)
        if class_depth and not getattr(attention, "mixes_tokens", True):
            raise ValueError(
                f"got {attention.__name__} and class_depth={class_depth}, expected class_depth=0: "
                "a class token that sees no other token gives every image the same answer"
            )
        self.stem = ConvStem(dim, stem_stride)
        self.stem_stride = stem_stride
        grid = [-(-side // stem_stride) for side in _height_and_width(img_size)]
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

    def forward_features(self, images, taps=(), sizes=None):
        """Images (B, 3, H, W) -> the tokens' grid (B, C, h, w), h = ⌈H / stride⌉, w = ⌈W / stride⌉.

        With `taps`, numbers of blocks from 1 on, a list of the grids after those blocks: what a
        pyramid is built from. With `sizes`, zeros stand where a picture has no token.
        """
        _check_images(images, sizes)
        s, (H, W) = self.stem_stride, images.shape[2:]
        grid = (H + s - 1) // s, (W + s - 1) // s  # (h, w)
        padding = None if sizes is None else _padding(sizes, s, grid)  # (B, 1, h, w)
        if sizes is not None:
            images = images.masked_fill(_padding(sizes, 1, (H, W)), 0)
        x = F.pad(images, (0, grid[1] * s - W, 0, grid[0] * s - H))
        # tokens (B, N, C) lie in memory as a channels-last image does: from here on the changes
        # between tokens and grids move no number. (torch.vmap knows no `memory_format`.)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        x = _beside_padding(self.stem, x, padding)  # (B, C, h, w)
        x = x + (self._positions(grid) if sizes is None else self._own_positions(grid, sizes))
        x = x.flatten(2).mT  # (B, N, C)
        after = [x]
        for block in self.blocks:
            after.append(x := block(x, grid, padding))
        grids = [_zero(after[n].mT.unflatten(2, grid), padding) for n in taps or (-1,)]
        return grids if taps else grids[0]  # each (B, C, h, w)

    def forward(self, images, sizes=None):
        x = self.forward_features(images, sizes=sizes)  # (B, C, h, w)
        padding = None
        if sizes is not None:
            padding = _padding(sizes, self.stem_stride, x.shape[2:]).flatten(1)  # (B, N)
        tokens = x.flatten(2).mT  # (B, N, C)
        if self.class_token is None:
            return self.head(_mean(self.norm(tokens), padding))  # (B, num_classes)
        class_token = self.class_token.expand(tokens.shape[0], -1, -1)  # (B, 1, C)
        for block in self.class_blocks:
            class_token = block(class_token, tokens, padding)
        return self.head(self.norm(class_token[:, 0]))  # (B, num_classes)

    def _positions(self, grid):
        """The positions of a grid: (1, C, h, w)."""
        # To its own grid, interpolation changes no bit. Whatever records this line for other sizes
        # (export, compile, trace) must record that it happens, and not that it was left out.
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not recorded and grid == self.positions.shape[2:]:
            return self.positions
        return F.interpolate(self.positions, size=grid, mode="bicubic", align_corners=False)

    def _own_positions(self, grid, sizes):
        """For each picture the positions of its own grid, as if it were alone: (B, C, h, w)."""
        own = [(-(-H // self.stem_stride), -(-W // self.stem_stride)) for H, W in sizes.tolist()]
        placed = {}
        for h, w in set(own):
            placed[h, w] = F.pad(self._positions((h, w)), (0, grid[1] - w, 0, grid[0] - h))
        return torch.cat([placed[each] for each in own])


# pico and nano are for images of 32 pixels, the others have XCiT's widths, depths and heads
SIZES = {
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
    """(parameters, multiply-adds) of any image model for one image of a side, or (height, width).

    Multiply-adds are those of its matrix products and convolutions, as PyTorch's FlopCounterMode
    counts them, halved. Raises ValueError for an img_size that is neither.
    """
    shadow = (
        copy.deepcopy(model).to("meta", torch.float32).eval().requires_grad_(False)
    )  # shapes without numbers
    image = torch.empty(1, 3, *_height_and_width(img_size), device="meta")
    with FlopCounterMode(display=False) as counter:
        shadow(image)
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


def _padding(sizes, cell, grid):
    """Booleans (B, 1, h, w): True where a cell of `cell` pixels begins beyond its picture's end."""
    rows = torch.arange(grid[0], device=sizes.device) * cell >= sizes[:, :1]  # (B, h)
    columns = torch.arange(grid[1], device=sizes.device) * cell >= sizes[:, 1:]  # (B, w)
    return (rows[:, :, None] | columns[:, None, :]).unsqueeze(1)  # (B, 1, h, w)


def _zero(x, padding):
    """x (B, C, H, W) with zeros in the padding, booleans (B, 1, h, w) that divide (H, W)."""
    return x if padding is None else x.masked_fill(_enlarge(padding, x), 0)


def _enlarge(padding, x):
    """Padding (B, 1, h, w) on the finer grid of x: (B, 1, H, W)."""
    rows, columns = x.shape[2] // padding.shape[2], x.shape[3] // padding.shape[3]
    return padding.repeat_interleave(rows, 2).repeat_interleave(columns, 3)


def _beside_padding(layer, x, padding):
    """layer(x), each picture of x (B, C, H, W) treated as if it had no padding beside it.

    A convolution sees zeros there, as it does beyond the edge of a tensor; BatchNorm in training
    leaves it out of its statistics. `padding`: booleans (B, 1, h, w) that divide (H, W), or None.
    """
    if padding is None:
        return layer(x)
    if isinstance(layer, nn.Sequential):
        for each in layer:
            x = _beside_padding(each, x, padding)
        return x
    if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and layer.training:
        real = ~_enlarge(padding, x)[:, 0]  # (B, H, W)
        normed = layer(x.movedim(1, -1)[real][:, :, None, None])[:, :, 0, 0]  # (n, C)
        y = normed.new_zeros(x.movedim(1, -1).shape)  # (B, H, W, C)
        return y.masked_scatter(real.unsqueeze(-1), normed).movedim(-1, 1)  # (B, C, H, W)
    return layer(_zero(x, padding))


def _mean(x, padding):
    """The mean over the tokens of x (B, N, C) that are not padding (B, N), or over all: (B, C)."""
    if padding is None:
        return x.mean(1)
    counts = (~padding).sum(1, keepdim=True)  # (B, 1)
    return x.masked_fill(padding.unsqueeze(-1), 0).sum(1) / counts


def _check_images(images, sizes):
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"got {images.dtype} of shape {tuple(images.shape)}, expected float images (batch, 3, "
            "height, width): scale bytes to floats with data.normalize, repeat grey three times, "
            "add the batch axis"
        )
    if sizes is None:
        return
    B, _, H, W = images.shape
    whole = (
        isinstance(sizes, torch.Tensor)
        and sizes.shape == (B, 2)
        and sizes.dtype in (torch.int64, torch.int32)
    )
    if not whole or (sizes < 1).any() or (sizes > sizes.new_tensor([H, W])).any():
        raise ValueError(
            f"got sizes {' '.join(str(sizes).split())}, expected a tensor {(B, 2)} of whole "
            "numbers (int64): each "
            f"picture's own height and width in pixels, from (1, 1) to {(H, W)}"
        )


def _check_counts(**counts):
    for name, count in counts.items():
        least = 0 if name.endswith("depth") else 1
        if not hasattr(count, "__index__") or count < least:
            raise ValueError(f"got {name}={count!r}, expected a whole number from {least} on")


def _height_and_width(img_size):
    """(height, width) of an image size: its side, or both."""
    sides = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(sides) != 2 or not all(hasattr(side, "__index__") and side >= 1 for side in sides):
        raise ValueError(
            f"got img_size={img_size!r}, expected a whole number of pixels from 1 on, or two of "
            "them: (height, width)"
        )
    return tuple(operator.index(side) for side in sides)
