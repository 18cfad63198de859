"""Softmax attention and X-ViT's attention: two functions and two modules that need PyTorch alone.

Axis order is PyTorch's, (..., tokens, channels). B is the batch, h the heads, N the tokens, d the
channels of a head, C = h * d the width. Method: Song and Lee, "X-ViT: High Performance Linear
Vision Transformer without Softmax", arXiv:2205.13805. This file works when it is copied out by
itself.
"""

import torch
import torch.nn.functional as F
from torch import nn

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
for _name in ("softmax_attention", "xnorm_attention", "_split_heads"):
    torch.fx.wrap(_name)  # torch.fx cannot trace checks of shapes: it calls these as they are


def softmax_attention(q, k, v, *, key_padding_mask=None):
    """Scaled dot-product attention, softmax(q kᵀ / √d) v: N² d multiply-adds for each product.

    Shapes: q (..., M, d), k (..., N, d), v (..., N, e) -> (..., M, e); M ≠ N is cross-attention.
    `key_padding_mask`: booleans (..., N), True where a token is padding; it changes nothing.
    Raises ValueError if shapes, dtypes or the mask do not fit.
    Source: Vaswani et al., arXiv:1706.03762.
    """
    _check(q, k, v, key_padding_mask)
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    k, v = _drop(k, key_padding_mask), _drop(v, key_padding_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~key_padding_mask.unsqueeze(-2))


def xnorm(x, gamma=1.0, dim=-1):
    """XNorm: the vectors of x along `dim` (an int or a tuple) get length |gamma|.

    Shape and dtype stay. `gamma`: a number, or a tensor that broadcasts to the shape of x with size
    1 along `dim`. The scale of a vector does not matter: only one shorter than the smallest normal
    number of float32 becomes zero, and so does its gradient (in float16, the gradient of one
    shorter than its own smallest normal number). Lengths are summed in float32 at least.
    Raises ValueError for a dtype or gamma that does not fit. Source: arXiv:2205.13805.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"got dtype {x.dtype}, expected one of {_DTYPES}: convert it with x.float()"
        )
    rough = _rough_length(x, dim)
    near_one = x / rough
    if x.dtype == torch.float16:  # the gradient of a vector shorter than 6e-5 would not fit
        short = rough < torch.finfo(torch.float16).tiny
        near_one = torch.where(short, near_one.detach(), near_one)
    return (near_one * _scale(near_one, gamma, dim)).to(x.dtype)


def xnorm_attention(q, k, v, gamma_q=1.0, gamma_kv=1.0, *, key_padding_mask=None):
    """X-ViT's attention, XN(q) XN(kᵀ v): N d² multiply-adds for each of its two products.

    XN(q) gives each query length |gamma_q|, XN(kᵀ v) each *column* of kᵀ v (dim -2, the key
    channels) length |gamma_kv|. A gamma is a number or a tensor that broadcasts to (..., 1, 1).
    Shapes, mask and errors are those of `softmax_attention`. The scale of the inputs does not
    matter. In float32 and bfloat16 that holds from 1e-18 to 1e16 at 65,536 tokens: kᵀ v still fits
    there. Source: arXiv:2205.13805.
    """
    _check(q, k, v, key_padding_mask, gamma_q, gamma_kv)
    if key_padding_mask is not None:
        k, v = _drop(k, key_padding_mask), _drop(v, key_padding_mask)
    if _computes_in_float16(k):
        # float16 ends at 65,504. The result does not depend on the length of a query, on the scale
        # of k, or on that of a channel of v, so choose those at which an entry of kᵀ v is at most
        # √(d N), and about 1 if k and v are unrelated
        N, d = k.shape[-2:]
        q, k, v = xnorm(q), xnorm(k, d**0.5 * N**0.25, dim=(-2, -1)), xnorm(v, N**0.25, dim=-2)
    # kᵀ v transposed, so that its columns lie in memory one after the other
    vk = v.mT @ k  # (..., e, d)
    # xnorm's two steps, the first in place: one copy less
    vk = vk.div_(_rough_length(vk))
    # only the product of the gammas counts, so both go here
    vk = (vk * _scale(vk, gamma_q * gamma_kv)).to(vk.dtype)  # (..., e, d)
    out = q @ vk.mT  # (..., M, e)
    return out.mul_(_unit_scale(q))  # late and in place


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention with a softmax: (B, N, C) -> (B, N, C), keys as in timm's ViT.

    `forward` takes `key_padding_mask`, booleans (B, N), True where a token is padding, and
    `num_queries`: with a number M only the first M tokens ask, and the result is (B, M, C).
    Raises ValueError if `dim` is not a multiple of `num_heads`, or if an input does not fit.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__()
        self.dim, self.num_heads = dim, _check_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, key_padding_mask=None, num_queries=None):
        q, k, v, mask = _split_heads(self.qkv, self.num_heads, x, key_padding_mask, num_queries)
        out = softmax_attention(q, k, v, key_padding_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, M, C)


class XNormAttention(nn.Module):
    """Multi-head self-attention of X-ViT: (B, N, C) -> (B, N, C), two learnable gammas per head.

    `forward` takes `key_padding_mask`, booleans (B, N), True where a token is padding, and
    `num_queries`: with a number M only the first M tokens ask, and the result is (B, M, C).
    Raises ValueError if `dim` is not a multiple of `num_heads`, or if an input does not fit.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__()
        self.dim, self.num_heads = dim, _check_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.gamma_q = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.gamma_kv = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, x, key_padding_mask=None, num_queries=None):
        q, k, v, mask = _split_heads(self.qkv, self.num_heads, x, key_padding_mask, num_queries)
        out = xnorm_attention(q, k, v, self.gamma_q, self.gamma_kv, key_padding_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, M, C)


def _split_heads(qkv, num_heads, x, key_padding_mask, num_queries):
    """(B, N, C) -> q (B, h, M, d), k and v (B, h, N, d), and the mask as (B, 1, N) or None."""
    if x.ndim != 3 or x.shape[-1] != qkv.in_features:
        raise ValueError(
            f"got x of shape {tuple(x.shape)}, expected (batch, tokens, {qkv.in_features}): "
            "flatten an image's grid into tokens, and put the channels last"
        )
    if key_padding_mask is not None:
        mask = key_padding_mask
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(
                f"got key_padding_mask {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
                f"(batch, tokens) = {tuple(x.shape[:2])}: give one boolean to each token"
            )
        # whatever stands in the padding would reach the gradient of the weights
        x, key_padding_mask = _drop(x, mask), mask.unsqueeze(1)
    if num_queries is not None and not 1 <= num_queries <= x.shape[1]:
        raise ValueError(
            f"got num_queries={num_queries} for {x.shape[1]} tokens, expected 1 to {x.shape[1]}: "
            "the first so many tokens ask"
        )
    # an adapter (LoRA), quantization, pruning and hooks do more than multiply by the weight
    hooks = qkv._forward_hooks or qkv._forward_pre_hooks or qkv._backward_hooks
    if num_queries is None or hooks or type(qkv) is not nn.Linear:
        all_three = qkv(x).unflatten(-1, (3, num_heads, -1))  # (B, N, 3, h, d)
        # one copy here: otherwise every product below would make a strided view contiguous
        q, k, v = all_three.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return q[:, :, :num_queries], k, v, key_padding_mask
    C = qkv.in_features
    b_q, b_kv = (None, None) if qkv.bias is None else (qkv.bias[:C], qkv.bias[C:])
    q = F.linear(x[:, :num_queries], qkv.weight[:C], b_q)  # (B, M, C)
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, h, M, d)
    kv = F.linear(x, qkv.weight[C:], b_kv).unflatten(-1, (2, num_heads, -1))  # (B, N, 2, h, d)
    k, v = kv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return q, k, v, key_padding_mask


def _length(x, dim=-1):
    """‖x‖ along dim (size 1 there): in float32 for float16, whose squares overflow above 256, else
    in x's dtype, as another would cost a tensor in bfloat16 a copy."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)


def _rough_length(x, dim=-1):
    """About ‖x‖, for a first division that brings vectors of any scale near length 1.

    In float32, squares overflow above 1e19 and vanish below 1e-19. There the length is wrong, and
    a limit stands in for it: good enough for the second division, by `_scale`, to be exact. What
    comes out of both does not depend on this one, so it takes no part in the gradient.
    """
    length = _length(x.detach(), dim)
    limit = torch.finfo(length.dtype).tiny ** 0.5
    return length.clamp(limit, 1 / limit)


def _scale(near_one, gamma=1.0, dim=-1):
    """gamma / ‖·‖ of what `_rough_length` has divided; 0 where there is no direction to keep."""
    length = _length(near_one, dim)
    if isinstance(gamma, torch.Tensor) and not _broadcasts(gamma.shape, length.shape):
        raise ValueError(
            f"got gamma of shape {tuple(gamma.shape)}, expected one that broadcasts to "
            f"{tuple(length.shape)}: one number per vector or per head"
        )
    limit = torch.finfo(length.dtype).tiny ** 0.5  # left of a vector of the smallest normal length
    return (gamma / length.masked_fill(length < limit, float("inf"))).to(length.dtype)


def _unit_scale(x, dim=-1):
    """1 / ‖x‖ in one pass, for lengths from 1e-19 to 1e19 (in float32), and 0 for zeros.

    A length that overflows gives NaN: 1 / inf would pass for a zero, and nobody would notice.
    """
    length = _length(x, dim)
    length = length.masked_fill(length == float("inf"), float("nan"))
    return 1 / length.masked_fill(length == 0, float("inf"))


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
            f"{got}, expected (..., tokens, channels) with two axes at least: "
            "add the missing ones with None"
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
                f"got gamma of shape {tuple(gamma.shape)}, expected a number or one that "
                "ends in (1, 1), such as (heads, 1, 1): one number per head"
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
                f"got key_padding_mask {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
                f"{tuple(tokens)} (k without its channels; a 1 may stand for batch or heads): "
                "True where a token is padding"
            )


def _broadcasts(shape, to):
    """Whether a tensor of `shape` broadcasts to the shape `to` without enlarging it."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to)))
