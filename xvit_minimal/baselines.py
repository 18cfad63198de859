"""Attentions to compare X-ViT's with: other methods', and its own with one thing changed.

Every class has the constructor (dim, num_heads=8, qkv_bias=False) and XNormAttention's `forward`,
so that `XViT(..., attention=XCA)` changes the attention and nothing else. q, k, v are (B, h, N, d):
B the batch, h the heads, N the tokens, d the channels of a head. With `num_queries` q has M rows.

The formulas stand as in their sources. Two things are added: padding, which is left out of every
sum and norm, and range. In float16 `mix` runs in float32, and no norm has a smallest length.
XCA and X-ViT's variants with both norms hold for inputs from 1e-18 to 1e16, as X-ViT does, and SimA
where its output, of the order of v / N, is a number. LinearAttention, FocusedAttention,
MagnitudeAwareAttention, UnnormalizedAttention, XNormKVOnly and XNormQOnly keep the inputs' scale:
in float32 the product of q, k, v and N has to stay below 3e38.
"""

import torch
from torch import nn

if __package__:
    from .attention import (
        SoftmaxAttention,
        XNormAttention,
        _computes_in_float16,
        _drop,
        _length,
        _split_heads,
        _unit_scale,
        xnorm,
    )
else:  # copied out, and imported as a file by itself
    from attention import (
        SoftmaxAttention,
        XNormAttention,
        _computes_in_float16,
        _drop,
        _length,
        _split_heads,
        _unit_scale,
        xnorm,
    )


class _Attention(SoftmaxAttention):
    """SoftmaxAttention's linear maps and heads, with `mix` in the place of its softmax.

    `mix` is what differs: q (B, h, M, d), k and v (B, h, N, d) -> (B, h, M, d), M = N without
    `num_queries`. Its `mask` is None or booleans (B, 1, N), True where a token is padding; q, k and
    v are zero there.
    """

    needs_every_query = False  # whether the first queries' outputs depend on the other queries

    def forward(self, x, key_padding_mask=None, num_queries=None):
        asked = None if self.needs_every_query else num_queries
        q, k, v, mask = _split_heads(self.qkv, self.num_heads, x, key_padding_mask, asked)
        if mask is not None:
            q, k, v = _drop(q, mask[..., : q.shape[-2]]), _drop(k, mask), _drop(v, mask)
        out = self._mix_in_range(q, k, v, mask)[..., :num_queries, :]  # (B, h, M, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, M, C)

    def _mix_in_range(self, q, k, v, mask):
        """`mix`, in float32 where float16 is asked for: there a sum over tokens overflows."""
        if not _computes_in_float16(q):
            return self.mix(q, k, v, mask)
        with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
            return self.mix(q.float(), k.float(), v.float(), mask).to(q.dtype)


class XCA(_Attention):
    """Cross-covariance attention, v softmax(τ q̂ᵀk̂)ᵀ; a channel of q̂ and k̂ has length 1 over tokens.

    The softmax is over d x d, for each channel of the output. τ is one learnable number per head
    and starts at 1. State-dict keys as in timm's. Every query counts in the length of a channel.
    Source: XCiT, El-Nouby et al., arXiv:2106.09681.
    """

    needs_every_query = True

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def mix(self, q, k, v, mask=None):
        q = (q * _unit_scale(q, dim=-2)).to(q.dtype)  # (B, h, N, d): each channel has unit length
        k = (k * _unit_scale(k, dim=-2)).to(k.dtype)  # (B, h, N, d)
        weights = (self.temperature * (q.mT @ k)).softmax(-1)  # (B, h, d, d)
        return v @ weights.mT  # (B, h, N, d)


class LinearAttention(_Attention):
    """φ(q)(φ(k)ᵀv) / (φ(q) Σφ(k)) with φ = elu + 1: each output is a mean of the values.

    Where φ(q)·Σφ(k) is below 1e-20 the output is zero.
    Source: Katharopoulos et al., arXiv:2006.16236.
    """

    def mix(self, q, k, v, mask=None):
        q, k = _positive(q), _positive(k)  # (B, h, N, d)
        if mask is not None:
            k = _drop(k, mask)  # φ(0) = 1
        return _weighted_mean(q, k, v)  # (B, h, N, d)


class FocusedAttention(_Attention):
    """φ(q)(φ(k)ᵀv) / (φ(q) Σφ(k)) with a φ that sharpens: relu(x), cubed, at its old length.

    Tokens whose features share no channel do not see each other; where a query sees none, the
    output is zero. FLatten adds a depthwise convolution of v, which is left to the body here: LPI
    has two. Its public code sharpens before it splits the heads, over the whole width; here each
    head is sharpened by itself, as the formula stands.
    Source: FLatten, Han et al., arXiv:2308.00442.
    """

    def mix(self, q, k, v, mask=None):
        return _weighted_mean(self.phi(q), self.phi(k), v)  # (B, h, N, d)

    def phi(self, x):
        x = x.clamp(min=0)  # (B, h, N, d)
        return (_length(x) * xnorm(xnorm(x) ** 3)).to(x.dtype)  # (B, h, N, d)


class MagnitudeAwareAttention(_Attention):
    """v̄ + (1 + 1/z) φ(q) φ(k)ᵀ(v - v̄) / (N√d), with z = φ(q)·φ(k)̄ / √d and φ = elu + 1.

    A bar is a mean over the tokens. The weights sum to one, and a longer φ(q) tells the values
    further apart. MALA writes (1 + 1/z) φ(q) φ(k)ᵀv / (N√d) - z v̄, which is the same, but
    subtracts two large numbers. What its public code has around the formula is left out: rotary
    positions and a depthwise convolution of v, for which the body has its own, and a gate.
    Source: MALA, Fan et al., arXiv:2507.00698.
    """

    def mix(self, q, k, v, mask=None):
        q, k = _positive(q), _positive(k)  # (B, h, N, d)
        if mask is not None:
            k = _drop(k, mask)  # φ(0) = 1
        N, dtype = _tokens(k, mask), torch.promote_types(v.dtype, torch.float32)
        centre = v.sum(-2, keepdim=True, dtype=dtype) / N  # (B, h, 1, d)
        kv = k.mT @ (v - centre).to(v.dtype) / N  # (B, h, d, d)
        root = q.shape[-1] ** 0.5
        z = q @ (k.sum(-2, keepdim=True, dtype=dtype) / N).to(k.dtype).mT / root  # (B, h, N, 1)
        steeper = 1 + 1 / z.masked_fill(z < 1e-20, float("inf"))
        return (centre + steeper * (q @ kv) / root).to(v.dtype)  # (B, h, N, d)


class EfficientAttention(_Attention):
    """softmax(q) (softmax(k)ᵀ v), over channels and over tokens: again a mean of the values.

    Source: Shen et al., arXiv:1812.01243.
    """

    def mix(self, q, k, v, mask=None):
        if mask is not None:
            k = k.masked_fill(mask.unsqueeze(-1), torch.finfo(k.dtype).min)  # weight 0
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)  # (B, h, N, d)


class SimA(_Attention):
    """q̂(k̂ᵀv), a channel of q̂ and k̂ with L1 norm 1 over the tokens: an output of the order of 1 / N.

    Every query counts in the norm of a channel.
    Source: Koohpayegani and Pirsiavash, arXiv:2206.08898.
    """

    needs_every_query = True

    def mix(self, q, k, v, mask=None):
        q, k = _unit_l1(q, dim=-2), _unit_l1(k, dim=-2)  # (B, h, N, d)
        return q @ (k.mT @ v)  # (B, h, N, d)


class UnnormalizedAttention(_Attention):
    """q(kᵀv) / N: X-ViT's factorization, with the mean over the tokens instead of both norms."""

    def mix(self, q, k, v, mask=None):
        return q @ (k.mT @ v / _tokens(k, mask))  # (B, h, N, d)


class NoMixing(_Attention):
    """v: no token sees another. What a model reaches with it is what its other parts can do alone.

    Give such a model class_depth=0: a class token that attends to itself never sees the image.
    """

    mixes_tokens = False

    def mix(self, q, k, v, mask=None):
        return v[..., : q.shape[-2], :]  # (B, h, N, d)


class _XNormVariant(_Attention):
    """XNormAttention in its clear form, γ_q q̂ · γ_kv (kᵀv)^: a subclass changes one thing."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        self.gamma_q = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.gamma_kv = nn.Parameter(torch.ones(num_heads, 1, 1))

    def mix(self, q, k, v, mask=None):
        return self.norm_q(q) @ self.norm_kv(k.mT @ v)  # (B, h, N, d)

    def norm_q(self, q):  # (B, h, N, d)
        return xnorm(q, self.gamma_q)

    def norm_kv(self, kv):  # (B, h, d, d)
        return xnorm(kv, self.gamma_kv, dim=-2)


class XNormRows(_XNormVariant):
    """The *rows* of kᵀv get length γ_kv, as in the public copies, and not its columns."""

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
    """One γ for both norms, drawn from a standard normal distribution, as in the public copies.

    Some heads start near 0.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        with torch.random.fork_rng(devices=[]):  # the weights drawn after it stay X-ViT's own
            nn.init.normal_(self.gamma_q)


class XNormKVOnly(_XNormVariant):
    """No norm on the queries: a long query has a large output."""

    def norm_q(self, q):
        return self.gamma_q * q  # (B, h, N, d)


class XNormQOnly(_XNormVariant):
    """No norm on kᵀv but the mean over the tokens: the output grows with keys and values."""

    def mix(self, q, k, v, mask=None):
        return self.norm_q(q) @ (self.gamma_kv * (k.mT @ v) / _tokens(k, mask))  # (B, h, N, d)


class XNormL1(_XNormVariant):
    """L1 norms along the same axes: bounded too, but the output is smaller, and not a cosine."""

    def norm_q(self, q):
        return self.gamma_q * _unit_l1(q, dim=-1)  # (B, h, N, d)

    def norm_kv(self, kv):
        return self.gamma_kv * _unit_l1(kv, dim=-2)  # (B, h, d, d)


class XNormQuiet(_XNormVariant):
    """γ_q starts at 0.1: X-ViT's attention, at first a tenth as loud."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        nn.init.constant_(self.gamma_q, 0.1)


class XNormL1Loud(XNormL1):
    """L1 norms again, but γ_q starts at 10: at first about as loud as X-ViT's attention."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__(dim, num_heads, qkv_bias)
        nn.init.constant_(self.gamma_q, 10)


class XNormCentred(_XNormVariant):
    """LayerNorm's step first: the mean is taken off each vector, an output is a correlation.

    A column of kᵀv loses its mean if each key does, and so before half precision rounds the sum.
    """

    def mix(self, q, k, v, mask=None):
        return super().mix(q - q.mean(-1, keepdim=True), k - k.mean(-1, keepdim=True), v)


def _positive(x):
    """elu(x) + 1 without the digits that the 1 would round away: exp(x) or x + 1."""
    return x.clamp(max=0).exp() + x.clamp(min=0)


def _weighted_mean(q, k, v):
    """q(kᵀv) / (q Σk), a mean of the values if q and k are positive; 0 if q·Σk is below 1e-20."""
    total = q @ k.sum(-2, keepdim=True).mT  # (B, h, N, 1)
    return q @ (k.mT @ v) / total.masked_fill(total < 1e-20, float("inf"))  # (B, h, N, d)


def _unit_l1(x, dim):
    """x with L1 norm 1 along dim, or zero where its entries are; the sum is taken in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = x.abs().sum(dim, keepdim=True, dtype=dtype)
    return (x / norm.masked_fill(norm < torch.finfo(dtype).tiny, float("inf"))).to(x.dtype)


def _tokens(k, mask):
    """How many tokens there are: a number, or (B, 1, 1, 1) if some of them are padding."""
    return k.shape[-2] if mask is None else (~mask).sum(-1).clamp(min=1)[..., None, None]


ATTENTIONS = {
    "xnorm": XNormAttention,
    "softmax": SoftmaxAttention,
    "xca": XCA,
    "linear": LinearAttention,
    "focused": FocusedAttention,
    "mala": MagnitudeAwareAttention,
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
    "xnorm-quiet": XNormQuiet,
    "xnorm-l1-loud": XNormL1Loud,
}
