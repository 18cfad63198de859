"""Softmax attention and X-ViT's attention: two functions and two modules that need PyTorch alone.

Axis order is PyTorch's, (..., tokens, channels). B is the batch, h the heads, N the tokens, d the channels of a
head, C = h * d the width. Method: Song and Lee, "X-ViT: High Performance Linear Vision Transformer without
Softmax", arXiv:2205.13805. This file works when it is copied out by itself.
"""

import torch
import torch.nn.functional as F
from torch import nn

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def softmax_attention(q, k, v, *, key_padding_mask=None):
    """Scaled dot-product attention, softmax(q kᵀ / √d) v: N² d multiply-adds for each of its two products.

    Shapes: q (..., M, d), k (..., N, d), v (..., N, e) -> (..., M, e); M ≠ N is cross-attention.
    `key_padding_mask`: booleans (..., N), True where a token is padding; a masked token changes nothing.
    Raises ValueError if shapes, dtypes or the mask do not fit. Source: Vaswani et al., arXiv:1706.03762.
    """
    _check(q, k, v, key_padding_mask)
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    k, v = _drop(k, key_padding_mask), _drop(v, key_padding_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~key_padding_mask.unsqueeze(-2))


def xnorm(x, gamma=1.0, dim=-1, eps=1e-12):
    """XNorm: the vectors of x along `dim` (an int or a tuple) get length |gamma|; shape and dtype stay.

    `gamma`: a number, or a tensor that broadcasts to the shape of x with size 1 along `dim`.
    A vector no longer than `eps` has no direction to keep: it becomes zero, and so does its gradient.
    Lengths are taken in float32 at least. Raises ValueError for a dtype or gamma that does not fit.
    Source: arXiv:2205.13805.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"got dtype {x.dtype}, expected one of {_DTYPES}: convert it with x.float()"
        )
    return (x * _scale(x, gamma, dim, eps)).to(x.dtype)


def xnorm_attention(q, k, v, gamma_q=1.0, gamma_kv=1.0, *, key_padding_mask=None):
    """X-ViT's attention, XN(q) XN(kᵀ v): N d² multiply-adds for each of its two products, no softmax.

    XN(q) gives each query length |gamma_q|, XN(kᵀ v) each *column* of kᵀ v (dim -2, the key channels) length
    |gamma_kv|. A gamma is a number or a tensor that broadcasts to (..., 1, 1): one per head.
    Shapes, mask and errors are those of `softmax_attention`. Source: arXiv:2205.13805.
    """
    _check(q, k, v, key_padding_mask, gamma_q, gamma_kv)
    if key_padding_mask is not None:
        k, v = _drop(k, key_padding_mask), _drop(v, key_padding_mask)
    if _computes_in_float16(k):
        # float16 ends at 65,504. The result does not depend on the length of a query, on the scale of k, or on that of
        # a channel of v, so choose those at which an entry of kᵀ v is at most √(d N), and about 1 if k and v are unrelated
        N, d = k.shape[-2:]
        q, k, v = xnorm(q), xnorm(k, d**0.5 * N**0.25, dim=(-2, -1)), xnorm(v, N**0.25, dim=-2)
    vk = (
        v.mT @ k
    )  # (..., e, d): kᵀ v transposed, so that its columns lie in memory one after the other
    vk = xnorm(
        vk, gamma_q * gamma_kv
    )  # (..., e, d): only the product of the gammas counts, so both go here
    return (q @ vk.mT).mul_(_scale(q))  # (..., M, e): a query's length divides its output, in place


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention with a softmax: (B, N, C) -> (B, N, C), state-dict keys as in timm's ViT.

    `key_padding_mask` of `forward`: booleans (B, N), True where a token is padding.
    Raises ValueError if `dim` is not a multiple of `num_heads`, or if an input does not fit.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__()
        self.dim, self.num_heads = dim, _check_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, key_padding_mask=None):
        q, k, v, mask = _split_heads(self, x, key_padding_mask)  # each (B, h, N, d)
        out = softmax_attention(q, k, v, key_padding_mask=mask)  # (B, h, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, C)


class XNormAttention(nn.Module):
    """Multi-head self-attention of X-ViT: (B, N, C) -> (B, N, C), one learnable gamma per head and per norm.

    `key_padding_mask` of `forward`: booleans (B, N), True where a token is padding.
    Raises ValueError if `dim` is not a multiple of `num_heads`, or if an input does not fit.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__()
        self.dim, self.num_heads = dim, _check_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.gamma_q = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.gamma_kv = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, x, key_padding_mask=None):
        q, k, v, mask = _split_heads(self, x, key_padding_mask)  # each (B, h, N, d)
        out = xnorm_attention(
            q, k, v, self.gamma_q, self.gamma_kv, key_padding_mask=mask
        )  # (B, h, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, C)


def _split_heads(module, x, key_padding_mask):
    """(B, N, C) -> q, k, v, each (B, h, N, d), and the mask as (B, 1, N) or None."""
    if x.ndim != 3 or x.shape[-1] != module.dim:
        raise ValueError(
            f"got x of shape {tuple(x.shape)}, expected (batch, tokens, {module.dim}): "
            "flatten an image's grid into tokens, and put the channels last"
        )
    if key_padding_mask is not None:
        if key_padding_mask.shape != x.shape[:2]:
            raise ValueError(
                f"got key_padding_mask of shape {tuple(key_padding_mask.shape)}, expected (batch, tokens) "
                f"= {tuple(x.shape[:2])}: give one boolean to each token"
            )
        key_padding_mask = key_padding_mask.unsqueeze(1)
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))  # (B, N, 3, h, d)
    # one copy here: otherwise every product below would make a strided view contiguous for itself
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return q, k, v, key_padding_mask


def _scale(x, gamma=1.0, dim=-1, eps=1e-12):
    """gamma / ‖x‖ along dim (size 1 there), 0 where ‖x‖ ≤ eps; in float32 at least."""
    dtype = torch.promote_types(
        x.dtype, torch.float32
    )  # a float16 sum of squares overflows at lengths over 256
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    if isinstance(gamma, torch.Tensor) and not _broadcasts(gamma.shape, norm.shape):
        raise ValueError(
            f"got gamma of shape {tuple(gamma.shape)}, expected one that broadcasts to {tuple(norm.shape)}: "
            "one number per vector or per head"
        )
    return gamma / norm.masked_fill(norm <= eps, float("inf"))


def _computes_in_float16(x):
    """Whether a matrix product of x runs in float16: its dtype, or what autocast makes of it."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type) == torch.float16
    return x.dtype == torch.float16


def _drop(x, key_padding_mask):
    """x (..., N, d) with zeros in the place of masked tokens, whatever stood there."""
    return x.masked_fill(key_padding_mask.unsqueeze(-1), 0)


def _check_heads(dim, num_heads):
    if num_heads < 1 or dim % num_heads:
        near = [h for h in range(1, dim + 1) if dim % h == 0]
        raise ValueError(
            f"got dim={dim} and num_heads={num_heads}, expected a width that the heads divide: "
            f"for this width, num_heads may be one of {near}"
        )
    return num_heads


def _check(q, k, v, key_padding_mask, *gammas):
    got = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ValueError(
            f"{got}, expected (..., tokens, channels) with two axes at least: add the missing ones with None"
        )
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ValueError(
            f"{got}, expected the same batch and heads in all three: expand() the smaller ones"
        )
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"{got}, expected as many tokens in v as in k: each key goes with one value"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{got}, expected as many channels in q as in k: project both to one width"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise ValueError(
            f"got dtypes {q.dtype}, {k.dtype}, {v.dtype}, expected one of {_DTYPES} for all three: "
            "convert them with .to(dtype)"
        )
    for gamma in gammas:
        if (
            isinstance(gamma, torch.Tensor)
            and gamma.ndim
            and gamma.shape[-2:] not in ((1, 1), (1,))
        ):
            raise ValueError(
                f"got gamma of shape {tuple(gamma.shape)}, expected a number or one that ends in (1, 1), "
                "such as (heads, 1, 1): one number per head"
            )
    if key_padding_mask is not None:
        mask, tokens = key_padding_mask, k.shape[:-1]
        fits = (
            mask.ndim == len(tokens)
            and mask.shape[-1] == tokens[-1]
            and _broadcasts(mask.shape, tokens)
        )
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"got key_padding_mask {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(tokens)} "
                "(k without its channels; a 1 may stand for batch or heads): True where a token is padding"
            )


def _broadcasts(shape, to):
    """Whether a tensor of `shape` broadcasts to the shape `to` without enlarging it."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to)))
