"""Attentions to compare X-ViT's with: other methods', and its own with one thing changed, for chapter 13's ablation.

Every class has the same constructor, (dim, num_heads=8, qkv_bias=False), and maps (B, N, C) -> (B, N, C), so that
`XViT(..., attention=XCA)` changes the attention and nothing else. q, k, v are (B, h, N, d): B the batch, h the heads, N the tokens, d the channels
of a head.
The formulas stand as in their sources, without X-ViT's care for float16: there the sums of LinearAttention, SimA and
UnnormalizedAttention overflow when tokens are many. In bfloat16 and float32 none does.
"""

import torch
import torch.nn.functional as F
from torch import nn

if __package__:
    from .attention import SoftmaxAttention, XNormAttention, _split_heads, xnorm
else:  # copied out, and imported as a file by itself
    from attention import SoftmaxAttention, XNormAttention, _split_heads, xnorm


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
        q, k = (
            F.normalize(q, dim=-2),
            F.normalize(k, dim=-2),
        )  # (B, h, N, d): each channel has unit length
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

    mixes_tokens = False

    def mix(self, q, k, v):
        return v  # (B, h, N, d)


class _XNormVariant(_Attention):
    """XNormAttention in its clear form, γ_q q̂ · γ_kv (kᵀv)^: a subclass changes one thing, and the rest stays."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        self.gamma_q = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.gamma_kv = nn.Parameter(torch.ones(num_heads, 1, 1))

    def mix(self, q, k, v):
        return self.norm_q(q) @ self.norm_kv(k.mT @ v)  # (B, h, N, d)

    def norm_q(self, q):  # (B, h, N, d)
        return xnorm(q, self.gamma_q)

    def norm_kv(self, kv):  # (B, h, d, d)
        return xnorm(kv, self.gamma_kv, dim=-2)


class XNormRows(_XNormVariant):
    """The *rows* of kᵀv get length γ_kv, as in the public copies of the method, and not its columns."""

    def norm_kv(self, kv):
        return xnorm(kv, self.gamma_kv, dim=-1)


class XNormFixedGamma(_XNormVariant):
    """Both γ stay 1: no head can become louder than another."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        self.gamma_q.requires_grad_(False)
        self.gamma_kv.requires_grad_(False)


class XNormSharedGamma(_XNormVariant):
    """One γ for both norms, starting at 1: it counts squared, so no head can change its sign."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        del self.gamma_kv

    def norm_kv(self, kv):
        return xnorm(kv, self.gamma_q, dim=-2)


class XNormRandomGamma(XNormSharedGamma):
    """One γ for both norms, drawn from a standard normal distribution, as in the public copies: some heads start near 0."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        nn.init.normal_(self.gamma_q)


class XNormKVOnly(_XNormVariant):
    """No norm on the queries: a long query has a large output."""

    def norm_q(self, q):
        return self.gamma_q * q  # (B, h, N, d)


class XNormQOnly(_XNormVariant):
    """No norm on kᵀv but the mean over the tokens: the output grows with the keys and the values."""

    def mix(self, q, k, v):
        return self.norm_q(q) @ (self.gamma_kv * (k.mT @ v) / k.shape[-2])  # (B, h, N, d)


class XNormL1(_XNormVariant):
    """L1 norms along the same axes: bounded too, but the output starts smaller, and no entry is a cosine."""

    def norm_q(self, q):
        return self.gamma_q * F.normalize(q, p=1, dim=-1)  # (B, h, N, d)

    def norm_kv(self, kv):
        return self.gamma_kv * F.normalize(kv, p=1, dim=-2)  # (B, h, d, d)


class XNormCentred(_XNormVariant):
    """LayerNorm's step first: the mean is taken off each vector, so that an output is a correlation, not a cosine."""

    def norm_q(self, q):
        return xnorm(q - q.mean(-1, keepdim=True), self.gamma_q)  # (B, h, N, d)

    def norm_kv(self, kv):
        return xnorm(kv - kv.mean(-2, keepdim=True), self.gamma_kv, dim=-2)  # (B, h, d, d)


ATTENTIONS = {
    "xnorm": XNormAttention,
    "softmax": SoftmaxAttention,
    "xca": XCA,
    "linear": LinearAttention,
    "efficient": EfficientAttention,
    "sima": SimA,
    "unnormalized": UnnormalizedAttention,
    "none": NoMixing,
}
VARIANTS = {
    "xnorm-rows": XNormRows,
    "xnorm-fixed-gamma": XNormFixedGamma,
    "xnorm-shared-gamma": XNormSharedGamma,
    "xnorm-random-gamma": XNormRandomGamma,
    "xnorm-kv-only": XNormKVOnly,
    "xnorm-q-only": XNormQOnly,
    "xnorm-l1": XNormL1,
    "xnorm-centred": XNormCentred,
}
