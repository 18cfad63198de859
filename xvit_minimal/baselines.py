"""Attentions to compare X-ViT's with: the same constructor, the same shapes, another way to mix the tokens.

Every class is (dim, num_heads=8, qkv_bias=False) and maps (B, N, C) -> (B, N, C), so that `XViT(..., attention=XCA)`
changes the attention and nothing else. q, k, v are (B, h, N, d): B the batch, h the heads, N the tokens, d the channels
of a head.
The formulas stand as in their sources, without X-ViT's care for float16: there the sums of LinearAttention, SimA and
UnnormalizedAttention overflow when tokens are many. In bfloat16 and float32 none does.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attention import SoftmaxAttention, XNormAttention, _split_heads


class _Attention(SoftmaxAttention):
    """SoftmaxAttention's linear maps and heads, with `mix` in the place of its softmax: (B, N, C) -> (B, N, C).

    `mix` is what differs: q, k, v, each (B, h, N, d) -> (B, h, N, d). No mask.
    Raises ValueError if `dim` is not a multiple of `num_heads`, or if an input does not fit.
    """

    def forward(self, x):
        q, k, v, _ = _split_heads(self, x, None)  # each (B, h, N, d)
        return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))  # (B, N, C)


class XCA(_Attention):
    """Cross-covariance attention, v softmax(τ q̂ᵀk̂)ᵀ, each channel of q̂ and k̂ with length 1 over the tokens.

    The softmax is over d x d, for each channel of the output. τ is one learnable number per head and starts at 1.
    State-dict keys as in timm's. Source: XCiT, El-Nouby et al., arXiv:2106.09681.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def mix(self, q, k, v):
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)  # (B, h, N, d): each channel has unit length
        weights = (self.temperature * (q.mT @ k)).softmax(-1)  # (B, h, d, d)
        return v @ weights.mT  # (B, h, N, d)


class LinearAttention(_Attention):
    """φ(q)(φ(k)ᵀv) / (φ(q) Σφ(k)) with φ = elu + 1: each output is a mean of the values.

    Where φ rounds to zero, the output is zero. Source: Katharopoulos et al., arXiv:2006.16236.
    """

    def mix(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1  # (B, h, N, d): positive
        total = q @ k.sum(-2, keepdim=True).mT  # (B, h, N, 1)
        return q @ (k.mT @ v) / total.clamp(min=1e-6)  # (B, h, N, d)


class EfficientAttention(_Attention):
    """softmax(q) (softmax(k)ᵀ v), the first over the channels, the second over the tokens: again a mean of the values.

    Source: Shen et al., arXiv:1812.01243.
    """

    def mix(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)  # (B, h, N, d)


class SimA(_Attention):
    """q̂(k̂ᵀv), each channel of q̂ and k̂ with L1 norm 1 over the tokens: the output is of the order of 1 / N.

    Source: Koohpayegani and Pirsiavash, arXiv:2206.08898.
    """

    def mix(self, q, k, v):
        q, k = F.normalize(q, p=1, dim=-2), F.normalize(k, p=1, dim=-2)  # (B, h, N, d)
        return q @ (k.mT @ v)  # (B, h, N, d)


class UnnormalizedAttention(_Attention):
    """q(kᵀv) / N: X-ViT's factorization, with the mean over the tokens in the place of both norms."""

    def mix(self, q, k, v):
        return q @ (k.mT @ v) / k.shape[-2]  # (B, h, N, d)


class NoMixing(_Attention):
    """v: no token sees another. What a model reaches with it is what its other parts can do alone.

    Give such a model class_depth=0: a class token that attends to itself alone never sees the image.
    """

    def mix(self, q, k, v):
        return v  # (B, h, N, d)


ATTENTIONS = {
    "xnorm": XNormAttention, "softmax": SoftmaxAttention, "xca": XCA, "linear": LinearAttention,
    "efficient": EfficientAttention, "sima": SimA, "unnormalized": UnnormalizedAttention, "none": NoMixing,
}
