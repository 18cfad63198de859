"""The other attentions against formulas with loops, what each discards, and one body for all."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from xvit_minimal import XViT, baselines, xnorm_attention
from xvit_minimal.baselines import (
    ATTENTIONS,
    VARIANTS,
    XCA,
    EfficientAttention,
    FocusedAttention,
    LinearAttention,
    MagnitudeAwareAttention,
    NoMixing,
    SimA,
    UnnormalizedAttention,
    _XNormVariant,
)
from xvit_minimal.model import ClassAttentionBlock

ALL = ATTENTIONS | VARIANTS
BASELINES = [
    XCA,
    LinearAttention,
    FocusedAttention,
    MagnitudeAwareAttention,
    EfficientAttention,
    SimA,
    UnnormalizedAttention,
    NoMixing,
]


# --- formulas of one head, one query: how much of each
# token's value it takes. q, k (N, d); n the query. XCA mixes channels: it has its own loop.


def elu_plus_one(x):
    return torch.stack([y + 1 if y > 0 else y.exp() for y in x])


def linear_weights(q, k, n):
    phi = elu_plus_one
    scores = [(phi(q[n]) * phi(k[m])).sum() for m in range(len(k))]
    return [score / sum(scores) for score in scores]


def focused_weights(q, k, n):
    def phi(x):
        x = [max(y.item(), 0.0) for y in x]
        length, cubes = sum(y**2 for y in x) ** 0.5, [y**3 for y in x]
        cubed = sum(y**2 for y in cubes) ** 0.5
        return [length * y / cubed if cubed else 0.0 for y in cubes]

    scores = [sum(a * b for a, b in zip(phi(q[n]), phi(k[m]))) for m in range(len(k))]
    total = sum(scores) or float("inf")  # nobody is seen
    return [score / total for score in scores]


def mala_weights(q, k, n):
    """With a factor and a shift, and not centred as in the package."""
    (N, d), phi = k.shape, elu_plus_one
    scores = [(phi(q[n]) * phi(k[m])).sum() / (N * d**0.5) for m in range(N)]
    z = sum(scores)
    return [(1 + 1 / z) * score - z / N for score in scores]


def efficient_weights(q, k, n):
    d = q.shape[1]
    query = [q[n, c].exp() / sum(q[n, j].exp() for j in range(d)) for c in range(d)]
    keys = [
        [k[m, c].exp() / sum(k[j, c].exp() for j in range(len(k))) for c in range(d)]
        for m in range(len(k))
    ]
    return [sum(a * b for a, b in zip(query, key)) for key in keys]


def sima_weights(q, k, n):
    return [
        sum(
            q[n, c] / q[:, c].abs().sum() * k[m, c] / k[:, c].abs().sum() for c in range(q.shape[1])
        )
        for m in range(len(k))
    ]


def unnormalized_weights(q, k, n):
    return [(q[n] * k[m]).sum() / len(k) for m in range(len(k))]


def no_weights(q, k, n):
    return [float(m == n) for m in range(len(k))]


WEIGHTS = {
    LinearAttention: linear_weights,
    FocusedAttention: focused_weights,
    MagnitudeAwareAttention: mala_weights,
    EfficientAttention: efficient_weights,
    SimA: sima_weights,
    UnnormalizedAttention: unnormalized_weights,
    NoMixing: no_weights,
}


def loop_xca(q, k, v, temperature):
    """XCA for one head, q, k, v (N, d): output channel i is a weighted sum of v's channels."""
    d = q.shape[1]
    channels = []  # each (N,)
    for i in range(d):
        scores = [
            (temperature * (q[:, i] * k[:, j]).sum() / (q[:, i].norm() * k[:, j].norm())).exp()
            for j in range(d)
        ]
        channels.append(sum(score / sum(scores) * v[:, j] for j, score in enumerate(scores)))
    return torch.stack(channels, dim=1)


def loop_module(module, x):
    """What the module has to compute for x (B, N, C), with loops over batch, heads and tokens."""
    B, N, C = x.shape
    d = C // module.num_heads
    out = torch.empty_like(x)
    for b in range(B):
        for head in range(module.num_heads):
            rows = [slice(part * C + head * d, part * C + (head + 1) * d) for part in range(3)]
            q, k, v = (
                x[b] @ module.qkv.weight[r].T + module.qkv.bias[r] for r in rows
            )  # each (N, d)
            columns = slice(head * d, (head + 1) * d)
            if isinstance(module, XCA):
                out[b, :, columns] = loop_xca(q, k, v, module.temperature[head].item())
                continue
            for n in range(N):
                weights = WEIGHTS[type(module)](q, k, n)
                out[b, n, columns] = sum(weight * v[m] for m, weight in enumerate(weights))
    return out @ module.proj.weight.T + module.proj.bias


def relative(out, reference):
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def filled(cls, dim=12, num_heads=3):
    """A float64 module whose every parameter, biases and temperatures too, is drawn at random."""
    module = cls(dim, num_heads, qkv_bias=True).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def learned(module):
    """The parameters that training moves: all but the gammas that a variant fixes."""
    return [p for p in module.parameters() if p.requires_grad]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("cls", BASELINES)
def test_module_equals_its_formula_written_with_loops(cls):
    module, x = filled(cls), draw(2, 7, 12)
    with torch.no_grad():
        assert relative(module(x), loop_module(module, x)) < 1e-12


def test_xca_equals_timm_with_the_same_weights():
    peers = pytest.importorskip("timm.models.xcit", reason="needs timm: pip install timm")
    Peer = peers.XCA
    ours, peer, x = filled(XCA), Peer(12, num_heads=3, qkv_bias=True).double(), draw(2, 7, 12)
    peer.load_state_dict(ours.state_dict())  # same names, same order of q, k, v and heads
    assert (ours.temperature != 1).all()
    for fused in (False, True):
        peer.fused_attn = fused
        assert relative(ours(x), peer(x)) < 1e-12


# --- what all of them share


def test_table_holds_every_attention_once():
    defined = [
        c
        for name, c in vars(baselines).items()
        if inspect.isclass(c) and issubclass(c, nn.Module) and not name.startswith("_")
    ]
    assert set(ALL.values()) == set(defined) and len(ATTENTIONS) + len(VARIANTS) == len(defined)
    assert set(BASELINES) < set(defined) and all(
        issubclass(cls, _XNormVariant) for cls in VARIANTS.values()
    )


@pytest.mark.parametrize("name", ALL)
def test_same_constructor_parameters_and_shapes(name):
    cls = ALL[name]
    assert list(inspect.signature(cls).parameters) == ["dim", "num_heads", "qkv_bias"]
    assert (
        cls(16).num_heads == 8
        and cls(16).qkv.bias is None
        and cls(16, qkv_bias=True).qkv.bias.shape == (48,)
    )
    shapes = {key: tuple(value.shape) for key, value in cls(12, 3).state_dict().items()}
    assert {key: shapes.pop(key) for key in ("qkv.weight", "proj.weight", "proj.bias")} == {
        "qkv.weight": (36, 12),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }
    assert all(
        shape == (3, 1, 1) for shape in shapes.values()
    )  # at most a few numbers per head come on top
    for N in (1, 2, 17):
        assert cls(12, 3)(torch.randn(2, N, 12)).shape == (2, N, 12)


@pytest.mark.parametrize("name", ALL)
def test_errors_say_what_to_do(name):
    with pytest.raises(
        ValueError, match=r"got dim=10 and num_heads=4.*may be one of \[1, 2, 5, 10\]"
    ):
        ALL[name](10, 4)
    with pytest.raises(
        ValueError, match=r"got x of shape \(2, 12, 4, 4\), expected \(batch, tokens, 12\): flatten"
    ):
        ALL[name](12, 3)(torch.randn(2, 12, 4, 4))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 9, 12), torch.zeros(2, 9, 12), 1e4 * torch.randn(2, 9, 12)],
    ids=["normal", "zero", "large"],
)
def test_outputs_and_gradients_are_finite(name, x):
    module, x = ALL[name](12, 3), x.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in [x, *learned(module)])


@pytest.mark.parametrize("name", ALL)
def test_permuted_tokens_give_permuted_outputs(name):
    module, x, order = filled(ALL[name]), draw(2, 9, 12), torch.randperm(9)
    assert relative(module(x[:, order]), module(x)[:, order]) < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_images_of_a_batch_do_not_mix(name):
    module, x = filled(ALL[name]), draw(3, 9, 12)
    assert relative(module(x), torch.cat([module(image[None]) for image in x])) < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_trains_one_step_inside_the_model(name):
    model = XViT(
        img_size=16,
        num_classes=3,
        dim=16,
        depth=2,
        num_heads=2,
        stem_stride=4,
        attention=ALL[name],
        class_depth=0,
    )
    before = [p.detach().clone() for p in learned(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned(model))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all((p != old).any() for p, old in zip(learned(model), before))


# --- X-ViT's own with one thing changed


def loop_variant(name, q, k, v, gamma_q, gamma_kv):
    """What a variant has to compute for one head, q, k, v (N, d), in loops over channels."""
    N, d = q.shape

    def unit(x, power=2, centre=False):  # a vector (d,)
        x = [y - sum(x) / len(x) for y in x] if centre else list(x)
        length = sum(abs(y) ** power for y in x) ** (1 / power)
        return [y / length for y in x]

    how = {"power": 1 if name.startswith("xnorm-l1") else 2, "centre": name == "xnorm-centred"}
    kv = [[sum(k[n, c] * v[n, j] for n in range(N)) for j in range(d)] for c in range(d)]  # [c][j]
    if name == "xnorm-rows":
        kv = [unit(row) for row in kv]
    elif name == "xnorm-q-only":
        kv = [[y / N for y in row] for row in kv]
    else:
        kv = [
            list(row) for row in zip(*(unit([kv[c][j] for c in range(d)], **how) for j in range(d)))
        ]
    rows = [list(row) if name == "xnorm-kv-only" else unit(list(row), **how) for row in q]
    second = gamma_q if name in ("xnorm-shared-gamma", "xnorm-random-gamma") else gamma_kv
    return torch.tensor(
        [
            [gamma_q * second * sum(row[c] * kv[c][j] for c in range(d)) for j in range(d)]
            for row in rows
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_loops(name):
    module, (q, k, v) = filled(VARIANTS[name]), (draw(1, 3, 7, 4) for _ in range(3))
    with torch.no_grad():
        out = module.mix(q, k, v)
        for head in range(3):
            gammas = [
                getattr(module, g, module.gamma_q)[head].item() for g in ("gamma_q", "gamma_kv")
            ]
            assert (
                relative(
                    out[0, head], loop_variant(name, q[0, head], k[0, head], v[0, head], *gammas)
                )
                < 1e-12
            )


def test_variants_start_from_the_package_s_attention():
    ours, clear, x = filled(ALL["xnorm"]), filled(_XNormVariant), draw(2, 7, 12)
    clear.load_state_dict(ours.state_dict())
    assert relative(clear(x), ours(x)) < 1e-12
    for name in ("xnorm-rows", "xnorm-kv-only", "xnorm-q-only", "xnorm-l1", "xnorm-centred"):
        other = VARIANTS[name](12, 3, qkv_bias=True).double()
        other.load_state_dict(ours.state_dict())
        assert relative(other(x), ours(x)) > 1e-2, f"{name} computes the same"


@pytest.mark.parametrize("name", [*ATTENTIONS.keys() - {"focused", "mala"}, *VARIANTS])
def test_the_same_seed_draws_the_same_first_weights_whatever_the_attention(name):
    """FocusedAttention and MagnitudeAwareAttention draw filters of their own in between."""

    def first(attention):
        torch.manual_seed(0)
        return XViT(16, 3, dim=16, depth=2, num_heads=2, attention=attention, class_depth=0)

    ours, other = first(ATTENTIONS["xnorm"]).state_dict(), first(ALL[name]).state_dict()
    shared = ours.keys() & other.keys()
    changed = {key for key in shared if not torch.equal(ours[key], other[key])}
    assert {key for key in ours if "gamma" not in key} <= shared
    assert all("gamma" in key for key in changed)


def test_gammas_of_the_variants():
    fixed = VARIANTS["xnorm-fixed-gamma"](12, 3)
    assert (
        (fixed.gamma_q == 1).all()
        and (fixed.gamma_kv == 1).all()
        and not fixed.gamma_q.requires_grad
    )
    shared, drawn = (
        VARIANTS["xnorm-shared-gamma"](12, 3),
        VARIANTS["xnorm-random-gamma"](4096, 1024),
    )
    assert (shared.gamma_q == 1).all() and [
        n for n, _ in shared.named_parameters() if "gamma" in n
    ] == ["gamma_q"]
    assert abs(drawn.gamma_q.mean()) < 0.15 and abs(drawn.gamma_q.std() - 1) < 0.1
    for name, start in (("xnorm-quiet", 0.1), ("xnorm-l1-loud", 10)):
        module = VARIANTS[name](12, 3)
        assert torch.allclose(module.gamma_q, torch.tensor(float(start)))
        assert (module.gamma_kv == 1).all() and module.gamma_q.requires_grad


# --- what sets one apart from another


def heads(N=11, d=5):
    """q, k, v (1, 3, N, d) of three heads."""
    return draw(1, 3, N, d), draw(1, 3, N, d), draw(1, 3, N, d)


@pytest.mark.parametrize(
    "cls",
    [LinearAttention, FocusedAttention, MagnitudeAwareAttention, EfficientAttention, NoMixing],
)
def test_weights_of_the_tokens_sum_to_one(cls):
    q, k, v = heads()
    if cls is FocusedAttention:  # a query that shares no channel with any key gets zero
        q, k = q.abs(), k.abs()
    everywhere = v[..., :1, :].expand_as(v)  # all tokens have one and the same value
    assert relative(cls(15, 3).double().mix(q, k, everywhere), everywhere) < 1e-12


@pytest.mark.parametrize("cls", [XCA, SimA, UnnormalizedAttention])
def test_weights_of_the_tokens_do_not_sum_to_one(cls):
    q, k, v = heads()
    everywhere = v[..., :1, :].expand_as(v)
    assert relative(cls(15, 3).double().mix(q, k, everywhere), everywhere) > 0.1


@pytest.mark.parametrize("cls", BASELINES)
def test_every_token_sees_every_other_except_without_mixing(cls):
    q, k, v = heads()
    if cls is FocusedAttention:  # sees nobody whose features share no channel with its own
        q, k = q.abs(), k.abs()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    sees = torch.stack(
        [
            torch.stack(
                torch.autograd.grad(
                    row.sum(),
                    (q, k, v),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            .abs()
            .sum((0, 1, 2, 4))
            > 0
            for row in filled(cls, 15).mix(q, k, v)[0].unbind(1)
        ]
    )  # (N, N)
    assert torch.equal(
        sees, torch.eye(11, dtype=torch.bool) if cls is NoMixing else torch.ones(11, 11).bool()
    )


def test_no_mixing_leaves_a_class_token_blind_and_is_refused():
    block = ClassAttentionBlock(16, 2, NoMixing).eval()
    token = torch.randn(1, 1, 16)
    assert torch.equal(block(token, torch.randn(1, 9, 16)), block(token, torch.randn(1, 9, 16)))
    with pytest.raises(ValueError, match="gives every image the same answer"):
        XViT(attention=NoMixing, class_depth=1)


@pytest.mark.parametrize("cls", BASELINES)
def test_only_sima_shrinks_when_all_tokens_are_repeated(cls):
    q, k, v = heads()
    module = cls(15, 3).double()
    once, thrice = (
        module.mix(q, k, v),
        module.mix(*(x.repeat(1, 1, 3, 1) for x in (q, k, v)))[..., :11, :],
    )
    assert relative(thrice, once / 3 if cls is SimA else once) < 1e-12


@pytest.mark.parametrize("cls", [XCA, SimA])
def test_lengths_of_channels_are_discarded(cls):
    q, k, v = heads()
    module, a, b = (
        cls(15, 3).double(),
        torch.rand(1, 3, 1, 5).double() + 0.1,
        torch.rand(1, 3, 1, 5).double() + 0.1,
    )
    assert relative(module.mix(a * q, b * k, v), module.mix(q, k, v)) < 1e-12


def test_efficient_attention_discards_the_mean_of_a_query_and_of_a_key_channel():
    q, k, v = heads()
    module = EfficientAttention(15, 3)
    assert (
        relative(module.mix(q + draw(1, 3, 11, 1), k + draw(1, 3, 1, 5), v), module.mix(q, k, v))
        < 1e-12
    )


def test_linear_attention_discards_the_length_of_a_mapped_query():
    q, k, v = (x.abs() for x in heads())  # φ(x) = x + 1
    module = LinearAttention(15, 3)
    assert relative(module.mix(3 * (q + 1) - 1, k, v), module.mix(q, k, v)) < 1e-12


def test_a_longer_query_tells_the_values_further_apart_in_mala_alone():
    q, k, v = (x.abs() for x in heads())  # φ(x) = x + 1
    for cls, grows in ((MagnitudeAwareAttention, True), (LinearAttention, False)):
        mix = cls(15, 3).double().mix
        spread = [(mix(s * (q + 1) - 1, k, v) - v.mean(-2, keepdim=True)).norm() for s in (1, 4)]
        assert (spread[1] > 1.5 * spread[0]) == grows


def test_focused_attention_gives_nothing_to_a_query_that_sees_nobody():
    q, k, v = -torch.ones(1, 1, 2, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    q.requires_grad_()
    out = FocusedAttention(4, 1).mix(q, k, v)
    assert out.eq(0).all() and torch.autograd.grad(out.sum(), q)[0].eq(0).all()


def test_unnormalized_attention_keeps_every_scale():
    q, k, v = heads()
    module = UnnormalizedAttention(15, 3)
    assert relative(module.mix(2 * q, 3 * k, 5 * v), 30 * module.mix(q, k, v)) < 1e-12


def test_xnorm_is_the_unnormalized_attention_with_a_scale_for_each_query_and_each_column():
    q, k, v = heads()
    ratio = xnorm_attention(q, k, v) / UnnormalizedAttention(15, 3).mix(q, k, v)  # (1, 3, N, d)
    query = 1 / q.norm(dim=-1, keepdim=True)  # (1, 3, N, 1)
    column = 11 / (k.mT @ v).norm(dim=-2, keepdim=True)  # (1, 3, 1, d)
    assert relative(ratio, query * column) < 1e-10


# --- half precision


def module_with_heads_as_they_are(cls, dtype):
    """A module of one head whose q, k and v are the channels of its input, and no projection."""
    module = cls(16, 1)
    module.qkv, module.proj = nn.Identity(), nn.Identity()
    module.qkv.in_features = 48
    return module.to(dtype)


@pytest.mark.parametrize("name", [name for name in ALL if name != "softmax"])  # PyTorch's, and slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [256, 16384, 65536])
def test_half_precision_is_exact_to_its_digits_at_any_number_of_tokens(N, dtype, name):
    x = torch.randn(1, N, 48) + 1
    out = module_with_heads_as_they_are(ALL[name], dtype)(x.to(dtype))
    exact = module_with_heads_as_they_are(ALL[name], torch.float64)(x.double())
    if name == "xnorm-random-gamma":  # drawn anew for each module
        out, exact = out.float() / out.float().norm(), exact / exact.norm()
        out = out * (out * exact).sum().sign()
    assert relative(out, exact) < 2e-2


@pytest.mark.parametrize("name", ALL)
def test_autocast_to_float16_does_not_overflow(name):
    module, x = ALL[name](16, 1, qkv_bias=True), torch.randn(1, 16384, 16)
    nn.init.constant_(module.qkv.bias, 3.0)  # sums over the tokens leave float16
    with torch.autocast("cpu", torch.float16):
        out = module(x)
    assert out.dtype == torch.float16 and relative(out, module(x)) < 2e-2


# --- scale, padding, fewer queries


SCALE_FREE = [n for n in ALL if n in ("xnorm", "xca") or n.startswith("xnorm-")]
SCALE_FREE = [n for n in SCALE_FREE if n not in ("xnorm-kv-only", "xnorm-q-only")]


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("power", [-18, -13, -7, 9, 16])
def test_norms_hold_at_every_scale(name, power):
    cls = ALL[name]
    q, k, v = (torch.randn(1, 1, 50, 16) for _ in range(3))
    module = module_with_heads_as_they_are(cls, torch.float32)
    once = module(torch.cat([q, k, v], -1)[0])
    size = 1.0 if name == "xca" else 10.0**power  # XCA's output has the scale of v
    scaled = module(torch.cat([q * 10.0**power, k * 10.0**power, v * size], -1)[0])
    assert relative(scaled, once) < 1e-5


@pytest.mark.parametrize("power", [-18, -13, -7, 9, 16])
def test_sima_has_no_smallest_length(power):
    q, k, v = heads(50)
    mix, q, k, v = SimA(15, 3).mix, q.float(), k.float(), v.float()
    assert relative(mix(q * 10.0**power, k * 10.0**power, v), mix(q, k, v)) < 1e-5


def test_linear_attention_is_a_mean_of_the_values_for_very_negative_keys_and_queries():
    q, k, v = (torch.randn(1, 1, 9, 4) for _ in range(3))
    exact = LinearAttention(4, 1).mix(q.double() - 20, k.double() - 10, v.double())
    assert relative(LinearAttention(4, 1).mix(q - 20, k - 10, v), exact) < 1e-5
    everywhere = v[..., :1, :].expand_as(v)
    out = LinearAttention(4, 1).mix(q - 20, k - 10, everywhere)
    torch.testing.assert_close(out, everywhere)
    q.requires_grad_()
    gone = LinearAttention(4, 1).mix(q - 200, k - 200, v)  # φ is zero: so is the output
    assert gone.eq(0).all() and torch.autograd.grad(gone.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "efficient"])
def test_a_softmax_of_large_numbers_picks_the_largest(name):
    x = 1e16 * torch.randn(1, 20, 48)
    out = module_with_heads_as_they_are(ALL[name], torch.float32)(x)
    q, k, v = x[0].split(16, -1)
    if name == "softmax":
        expected = v[(q @ k.T).argmax(-1)]
    else:
        expected = v[k.argmax(0)][q.argmax(-1)]
    torch.testing.assert_close(out[0], expected)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("name", ALL)
def test_padding_changes_no_real_token(name, content):
    module, x = filled(ALL[name]), draw(3, 9, 12)
    lengths = (9, 5, 1)
    mask = torch.arange(9) >= torch.tensor(lengths)[:, None]
    padded = x.masked_fill(mask.unsqueeze(-1), content)
    out = module(padded, key_padding_mask=mask)
    for one, image, length in zip(out, x, lengths):
        assert relative(one[:length], module(image[None, :length])[0]) < 1e-12
    out[~mask].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in learned(module))
    with pytest.raises(ValueError, match=r"float64.*torch.bool.*\(3, 9\)"):
        module(x, key_padding_mask=mask.double())


@pytest.mark.parametrize("name", ALL)
def test_the_first_tokens_alone_may_ask(name):
    module, x = filled(ALL[name]), draw(2, 9, 12)
    mask = torch.arange(9) >= torch.tensor([9, 5])[:, None]
    for M in (1, 3, 9):
        for padding in (None, mask):
            out = module(x, padding, num_queries=M)
            assert out.shape == (2, M, 12)
            assert relative(out, module(x, padding)[:, :M]) < 1e-12
    cost = {}
    for M in (1, None):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x, num_queries=M)
        cost[M] = counter.get_total_flops()
    # XCA and SimA give each channel of the queries a length over all tokens, and save the
    # projection alone
    projection = 2 * 2 * 8 * 12 * 12
    saved = cost[None] - cost[1]
    assert saved == projection if name in ("xca", "sima") else saved >= 2 * projection


@pytest.mark.parametrize("name", ALL)
def test_autocast_agrees_with_float32(name):
    module, x = ALL[name](32, 4), torch.randn(2, 64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert relative(out, module(x)) < 5e-2
