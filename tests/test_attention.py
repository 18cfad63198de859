"""The attention against references written with loops, in every precision and at every scale."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from xvit_minimal import SoftmaxAttention, XNormAttention, softmax_attention, xnorm, xnorm_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
MODULES = [SoftmaxAttention, XNormAttention]
FUNCTIONS = [softmax_attention, xnorm_attention]


def loop_xnorm_attention(q, k, v, gamma_q=1.0, gamma_kv=1.0):
    """The definition with loops over channels, in float64; q, k, v (..., tokens, channels)."""
    q, k, v = q.double(), k.double(), v.double()
    d, width = k.shape[-1], v.shape[-1]
    columns = []
    for e in range(width):
        column = [
            (k[..., c] * v[..., e]).sum(-1) for c in range(d)
        ]  # d entries of one column of KᵀV
        length = sum(entry**2 for entry in column).sqrt()
        columns.append(
            [torch.where(length > 0, gamma_kv * entry / length, 0.0) for entry in column]
        )
    length = sum(q[..., c] ** 2 for c in range(d)).sqrt()
    out = [sum(q[..., c] * columns[e][c][..., None] for c in range(d)) for e in range(width)]
    return torch.stack([torch.where(length > 0, gamma_q * o / length, 0.0) for o in out], dim=-1)


def loop_softmax_attention(q, k, v):
    """The definition with a loop over queries, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for n in range(q.shape[-2]):
        weight = ((q[..., n : n + 1, :] * k).sum(-1) / math.sqrt(q.shape[-1])).exp()
        rows.append((weight[..., None] * v).sum(-2) / weight.sum(-1, keepdim=True))
    return torch.stack(rows, dim=-2)


def relative(out, reference):
    return ((out.double() - reference).norm() / reference.norm()).item()


SCALES = {  # the powers of ten of the inputs that each dtype has to bear
    torch.float32: (-18, 16),
    torch.bfloat16: (-18, 16),
    torch.float16: (-6, 4),
    torch.float64: (-70, 60),  # the loops have no protection of their own
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("N", [1, 17, 65536])
def test_xnorm_attention_equals_the_loops_at_every_scale(N, mean, dtype):
    torch.manual_seed(N)
    least, most = SCALES[dtype]
    for power in (least, least // 2, 0, most // 2, most):
        q, k, v = (((torch.randn(2, N, 8) + mean) * 10.0**power).to(dtype) for _ in range(3))
        for x in (q, k, v):
            x.requires_grad_(N < 100)  # gradients of the long ones are left to another test
        out = xnorm_attention(q, k, v)
        assert out.dtype == dtype
        expected = loop_xnorm_attention(q, k, v)
        # all entries are cosines: if one token's all happen to be small, their errors are not
        size = expected.norm().clamp(min=0.2 * expected.numel() ** 0.5)
        assert (out.double() - expected).norm() < TOLERANCE[dtype] * size, power
        if N < 100 and dtype != torch.float16:  # 1 / 1e-6 is at float16's end
            for gradient in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
                assert gradient.isfinite().all(), power


def test_each_query_and_each_value_channel_may_have_a_scale_of_its_own():
    torch.manual_seed(0)
    q = torch.randn(50, 8) * 10.0 ** torch.linspace(-18, 16, 50)[:, None]
    k, v = torch.randn(50, 8), torch.randn(50, 4) * torch.tensor([1e-18, 1e-3, 1e5, 1e16])
    out = xnorm_attention(q, k, v)
    assert (out - loop_xnorm_attention(q, k, v)).abs().max() < 1e-5


@pytest.mark.parametrize("power", [-18, -7, 0, 9, 16])
@pytest.mark.parametrize("N", [3, 4096])
def test_gradients_at_every_scale_agree_with_float64(N, power):
    torch.manual_seed(N)
    inputs = [(torch.randn(2, N, 8) * 10.0**power).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(2, N, 8)
    ours = torch.autograd.grad(xnorm_attention(*inputs), inputs, upstream)
    reference = torch.autograd.grad(loop_xnorm_attention(*exact), exact, upstream.double())
    for gradient, expected in zip(ours, reference):
        assert relative(gradient, expected) < 1e-5


def test_a_query_too_long_to_measure_gives_nan_and_no_number():
    q, k, v = torch.full((1, 4), 1e20), torch.randn(3, 4), torch.randn(3, 4)
    assert xnorm_attention(q, k, v).isnan().all()
    torch.testing.assert_close(xnorm(q), torch.full((1, 4), 0.5))  # the function alone bears it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision_agree_with_float64(dtype):
    q, k, v = ((torch.randn(2, 256, 32) + 0.5).to(dtype).requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(2, 256, 32).to(dtype)
    ours = torch.autograd.grad(xnorm_attention(q, k, v), (q, k, v), upstream)
    reference = torch.autograd.grad(xnorm_attention(*exact), exact, upstream.double())
    for gradient, expected in zip(ours, reference):
        assert relative(gradient, expected) < 2 * TOLERANCE[dtype]


def test_float16_bears_a_long_query_and_a_loud_channel():
    q, k, v = (torch.randn(3, 500, 16) for _ in range(3))
    q[:, ::2] *= 15_000  # length about 60,000
    q[:, 1::2] *= 1e-3
    v[..., 3] *= 10_000
    q, k, v = q.half(), k.half(), v.half()
    assert (
        relative(xnorm_attention(q, k, v), loop_xnorm_attention(q, k, v)) < TOLERANCE[torch.float16]
    )


def test_gradients_are_the_numerical_ones():
    inputs = [torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gammas = [
        torch.tensor([[[1.5]], [[-0.5]]], dtype=torch.float64, requires_grad=True) for _ in range(2)
    ]
    assert torch.autograd.gradcheck(xnorm_attention, (*inputs, *gammas))


def test_softmax_attention_equals_the_loops():
    q, k, v = torch.randn(7, 4), torch.randn(9, 4), torch.randn(9, 5)
    assert relative(softmax_attention(q, k, v), loop_softmax_attention(q, k, v)) < 1e-5


def test_every_column_of_the_normalized_kv_has_length_gamma():
    k, v = torch.randn(100, 8, dtype=torch.float64), torch.randn(100, 6, dtype=torch.float64)
    unit_queries = torch.eye(8, dtype=torch.float64)  # they read out the rows of the normalized KᵀV
    for gamma in (1.0, -2.5):
        kv_hat = xnorm_attention(unit_queries, k, v, gamma_kv=gamma)  # (8, 6)
        torch.testing.assert_close(
            kv_hat.norm(dim=-2), torch.full((6,), abs(gamma), dtype=torch.float64)
        )
        assert (kv_hat.norm(dim=-1) - abs(gamma)).abs().max() > 0.01  # the other axis is told apart


def test_gamma_per_head_scales_each_head():
    q, k, v = (torch.randn(2, 3, 10, 4, dtype=torch.float64) for _ in range(3))
    gamma_q, gamma_kv = (torch.randn(3, 1, 1, dtype=torch.float64) for _ in range(2))
    out = xnorm_attention(q, k, v, gamma_q, gamma_kv)
    torch.testing.assert_close(out, xnorm_attention(q, k, v) * gamma_q * gamma_kv)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("what", ["query", "value channel", "all"])
def test_a_vector_without_direction_gives_zeros_and_finite_gradients(what, dtype):
    q, k, v = (torch.randn(2, 12, 4).to(dtype) for _ in range(3))
    if what == "query":
        q[0, 3] = 0
    elif what == "value channel":
        v[:, :, 2] = 0
    else:
        q, k, v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out = xnorm_attention(q, k, v)
    zero = {"query": out[0, 3], "value channel": out[:, :, 2], "all": out}[what]
    assert zero.eq(0).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    if what == "all":
        assert all(g.eq(0).all() for g in gradients)


def test_xnorm_gives_vectors_the_length_gamma():
    x = torch.randn(5, 6, 7, dtype=torch.float64)
    for dim in (-1, 0, 1, (1, 2)):
        lengths = torch.linalg.vector_norm(xnorm(x, gamma=3.0, dim=dim), dim=dim)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 3.0))
    # its length, 32,000, fits; its sum of squares does not
    long = torch.full((1, 1024), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(xnorm(long), torch.full_like(long, 1 / 32))


@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("dim", [-1, 0, (0, 1)], ids=str)
def test_xnorm_does_not_see_the_scale(dim, dtype):
    info = torch.finfo(dtype)
    x = (torch.rand(6, 7, dtype=torch.float64) + 0.5).to(dtype)
    expected = x.double() / x.double().norm(dim=dim, keepdim=True)
    for scale in (64 * info.tiny, info.tiny**0.5, 1.0, 2.0 ** (math.log2(info.max) // 1 - 8)):
        scaled = x * scale  # powers of two: no rounding
        assert scaled.isfinite().all() and (scaled / scale).equal(x)
        assert relative(xnorm(scaled, dim=dim), expected) < TOLERANCE.get(dtype, 1e-14)


@pytest.mark.parametrize("dtype", SCALES, ids=str)
def test_zeros_and_numbers_below_the_normal_ones_have_finite_gradients(dtype):
    tiny = torch.finfo(dtype).tiny
    for length in (0.0, tiny / 4, tiny / 64):
        x = torch.full((3, 1), length, dtype=dtype, requires_grad=True)
        y = xnorm(x, dim=-1)
        assert y.isfinite().all()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.eq(0).all()
        q, k, v = (torch.full((5, 4), length, dtype=dtype, requires_grad=True) for _ in range(3))
        out = xnorm_attention(q, k, v)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_cross_attention_and_values_of_another_width(function):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 6)
    out = function(q, k, v)
    assert out.shape == (2, 3, 5, 6)
    loop = loop_xnorm_attention if function is xnorm_attention else loop_softmax_attention
    assert relative(out, loop(q, k, v)) < 1e-5


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_masked_token_changes_nothing(function):
    q, k, v = (torch.randn(2, 3, 10, 4) for _ in range(3))
    mask = torch.zeros(2, 1, 10, dtype=torch.bool)
    mask[0, :, 7:] = True
    out = function(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(out[0], function(q[:1], k[:1, :, :7], v[:1, :, :7])[0])
    torch.testing.assert_close(out[1], function(q[1:], k[1:], v[1:])[0])
    k[0, :, 7:], v[0, :, 8:] = float("nan"), float("inf")  # padding may hold anything
    torch.testing.assert_close(function(q, k, v, key_padding_mask=mask), out)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_ignores_masked_tokens(module):
    layer, x = module(12, num_heads=3), torch.randn(2, 9, 12)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 5:] = True
    out = layer(x, key_padding_mask=mask)
    torch.testing.assert_close(out[1, :5], layer(x[1:, :5])[0])
    assert not torch.allclose(layer(x)[1, :5], out[1, :5])


@pytest.mark.parametrize("module", MODULES)
def test_a_module_equals_its_heads_one_by_one(module):
    layer = module(12, num_heads=3, qkv_bias=True).double()
    for name, parameter in layer.named_parameters():
        if "gamma" in name:
            nn.init.normal_(parameter)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).split(12, dim=-1)  # each (B, N, C)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        if module is XNormAttention:
            gammas = layer.gamma_q[h].item(), layer.gamma_kv[h].item()
            heads.append(loop_xnorm_attention(q[..., part], k[..., part], v[..., part], *gammas))
        else:
            heads.append(loop_softmax_attention(q[..., part], k[..., part], v[..., part]))
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, dim=-1)))


def test_state_dict_keys_are_those_of_timm():
    assert list(SoftmaxAttention(8, 2, qkv_bias=True).state_dict()) == [
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
    ]
    extra = XNormAttention(8, 2).load_state_dict(SoftmaxAttention(8, 2).state_dict(), strict=False)
    assert extra.missing_keys == ["gamma_q", "gamma_kv"] and not extra.unexpected_keys
    layer = XNormAttention(8, 2)
    assert layer.gamma_q.shape == layer.gamma_kv.shape == (2, 1, 1)
    assert layer.gamma_q.eq(1).all() and layer.gamma_kv.eq(1).all()


def test_weights_of_torch_multihead_attention_move_over():
    theirs, ours = (
        nn.MultiheadAttention(12, 3, batch_first=True),
        SoftmaxAttention(12, 3, qkv_bias=True),
    )
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            "qkv.weight": state["in_proj_weight"],
            "qkv.bias": state["in_proj_bias"],
            "proj.weight": state["out_proj.weight"],
            "proj.bias": state["out_proj.bias"],
        }
    )
    x, mask = torch.randn(2, 6, 12), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    expected = theirs(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    out = ours(x, key_padding_mask=mask)  # what a padded token itself gets is nobody's business
    torch.testing.assert_close(out[~mask], expected[~mask], rtol=1e-4, atol=1e-5)


def test_invariances():
    q, k, v = (torch.randn(3, 20, 6, dtype=torch.float64) for _ in range(3))
    out = xnorm_attention(q, k, v)
    same = torch.testing.assert_close
    same(xnorm_attention(q * 7, k * 0.01, v * 300), out)
    same(
        xnorm_attention(q * torch.rand(3, 20, 1).double().add(0.1), k, v), out
    )  # each query on its own
    same(
        xnorm_attention(q, k, v * torch.rand(3, 1, 6).double().add(0.1)), out
    )  # each value channel on its own
    same(xnorm_attention(q, k.repeat(1, 4, 1), v.repeat(1, 4, 1)), out)
    order = torch.randperm(20)
    same(xnorm_attention(q[:, order], k[:, order], v[:, order]), out[:, order])
    assert out.abs().max() <= 1


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_first_tokens_alone_may_ask(module, bias):
    layer, x = module(12, num_heads=3, qkv_bias=bias).double(), torch.randn(2, 9, 12).double()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 5:] = True
    for M in (1, 4, 9):
        for padding in (None, mask):
            out = layer(x, padding, num_queries=M)
            torch.testing.assert_close(out, layer(x, padding)[:, :M])
    assert flops(layer, x, num_queries=1) < flops(layer, x)
    for M in (0, 10):
        with pytest.raises(ValueError, match=rf"got num_queries={M} for 9 tokens, expected 1 to 9"):
            layer(x, num_queries=M)


class LowRankAdapter(nn.Module):
    """What LoRA puts in a linear map's place; its weight and bias are those of the map inside."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.in_features = inside, inside.in_features
        self.down = nn.Linear(inside.in_features, 2, bias=False)
        self.up = nn.Linear(2, inside.out_features, bias=False)

    weight = property(lambda self: self.inside.weight)
    bias = property(lambda self: self.inside.bias)

    def forward(self, x):
        return self.inside(x) + self.up(self.down(x))


def adapted(layer):
    layer.qkv = LowRankAdapter(layer.qkv)


def hooked(layer):
    layer.qkv.register_forward_hook(lambda module, inputs, output: 2 * output + 1)


def pruned(layer):
    prune.l1_unstructured(layer.qkv, "weight", 0.5)  # a hook makes the weight at every call
    with torch.no_grad():
        layer.qkv.weight_orig.mul_(-3).add_(1)


def quantized(layer):
    layer.qkv = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer.qkv), {nn.Linear})[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("changed", [adapted, hooked, pruned, quantized])
@pytest.mark.parametrize("module", MODULES)
def test_what_stands_in_place_of_a_linear_map_is_called_for_few_queries_too(module, changed):
    layer, x = module(12, num_heads=3), torch.randn(2, 9, 12)
    plain = layer(x)
    changed(layer)
    few = layer(x, num_queries=2)
    torch.testing.assert_close(few, layer(x)[:, :2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(few, plain[:, :2], rtol=1e-5, atol=1e-6)


def flops(layer, x, **options):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("module", MODULES)
def test_padding_may_hold_nan_and_reaches_no_gradient(module):
    layer, x = module(12, num_heads=3, qkv_bias=True), torch.randn(2, 9, 12)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 5:] = True
    expected = layer(x[1:, :5])[0]
    x[1, 5:] = float("nan")
    out = layer(x, mask)
    torch.testing.assert_close(out[1, :5], expected)
    out[~mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_non_contiguous_inputs(function):
    fused = torch.randn(2, 9, 3, 4, 8)  # (B, N, 3, h, d), as a fused qkv layer gives it
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    torch.testing.assert_close(
        function(q, k, v), function(q.contiguous(), k.contiguous(), v.contiguous())
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(function, dtype):
    q, k, v = (torch.randn(2, 3, 30, 8) + 1 for _ in range(3))
    expected = function(q, k, v)
    with torch.autocast("cpu", dtype):
        assert relative(function(q, k, v), expected.double()) < TOLERANCE[dtype]
        layer = XNormAttention(12, 3)
        assert layer(torch.randn(2, 9, 12)).dtype == dtype


def test_autocast_to_float16_does_not_overflow_at_65536_tokens():
    q, k, v = (torch.ones(65536, 4) for _ in range(3))
    with torch.autocast("cpu", torch.float16):
        assert xnorm_attention(q, k, v).isfinite().all()


@pytest.mark.parametrize("module", MODULES)
def test_compile_without_graph_breaks(module):
    torch._dynamo.reset()
    layer, x = module(12, num_heads=3), torch.randn(2, 9, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_vmap_and_grad_of_torch_func():
    gammas = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    q, k, v = (torch.randn(2, 8, 4, dtype=torch.float64) for _ in range(3))
    for position in (3, 4):
        dims = [0 if i == position else None for i in range(5)]
        arguments = [q, k, v, 1.0, 1.0]
        arguments[position] = gammas
        swept = torch.func.vmap(xnorm_attention, in_dims=tuple(dims))(*arguments)
        torch.testing.assert_close(swept, gammas * xnorm_attention(q, k, v))

    q, k, v = (torch.randn(5, 8, 4, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(torch.func.vmap(xnorm_attention)(q, k, v), xnorm_attention(q, k, v))

    def loss(q, k, v):
        return xnorm_attention(q, k, v).square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    together = torch.autograd.grad(loss(q.requires_grad_(), k, v), q)[0]
    torch.testing.assert_close(per_example, together)


@pytest.mark.parametrize("module", MODULES)
def test_export_with_any_batch_and_any_number_of_tokens(module):
    layer, x, other = module(12, num_heads=3), torch.randn(2, 9, 12), torch.randn(3, 17, 12)
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=sizes).module()
    for tokens in (x, other):
        torch.testing.assert_close(exported(tokens), layer(tokens))


@pytest.mark.parametrize("module", MODULES)
def test_onnx(module, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}: pip install onnx onnxscript onnxruntime")
    import onnxruntime

    layer, x, other = module(12, num_heads=3), torch.randn(2, 9, 12), torch.randn(3, 17, 12)
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    path = str(tmp_path / "layer.onnx")
    torch.onnx.export(layer, (x,), path, dynamo=True, dynamic_shapes=sizes)
    session = onnxruntime.InferenceSession(path)
    for tokens in (x, other):
        (out,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), layer(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", MODULES)
def test_torch_fx_and_jit_trace(module):
    layer, x, other = module(12, num_heads=3), torch.randn(2, 9, 12), torch.randn(3, 17, 12)
    for graph in (torch.fx.symbolic_trace(layer), torch.jit.trace(layer, (x,))):
        for tokens in (x, other):
            torch.testing.assert_close(graph(tokens), layer(tokens))


def timm_attention():
    """The adapter that chapter 6 shows, as it stands there."""
    chapter = Path(__file__).parents[1] / "book/part2/06_a_few_lines.ipynb"
    cells = ["".join(cell["source"]) for cell in json.loads(chapter.read_text())["cells"]]
    (source,) = (cell for cell in cells if cell.startswith("class TimmAttention("))
    names = {"torch": torch, "nn": nn, "XNormAttention": XNormAttention}
    exec(source, names)
    return names["TimmAttention"]


def test_the_adapter_of_chapter_6_works_in_timm_s_models_both_ways():
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    Attention, image = timm_attention(), torch.randn(1, 3, 32, 32)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
    swapped = timm.models.VisionTransformer(**size, qkv_bias=True, num_classes=5)
    for block in swapped.blocks:
        block.attn = Attention(12, num_heads=3, qkv_bias=True)
    built = timm.models.VisionTransformer(**size, num_classes=5, attn_layer=Attention)
    assert isinstance(built.blocks[0].attn, XNormAttention)
    missing = built.load_state_dict(swapped.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    torch.testing.assert_close(built.eval()(image), swapped.eval()(image))
    with pytest.raises(ValueError, match="got attn_mask.*expected None.*key_padding_mask"):
        built(image, attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="got qk_norm, expected.*leave it out"):
        timm.models.VisionTransformer(**size, qk_norm=True, attn_layer=Attention)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2"]
)
def test_the_adapter_of_chapter_6_stands_in_for_the_attention_of(name):
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    model = timm.create_model(name, img_size=56).eval()
    for block in model.blocks[:2]:
        old = block.attn
        block.attn = timm_attention()(old.qkv.in_features, old.num_heads, qkv_bias=True)
        assert block.attn.load_state_dict(old.state_dict(), strict=False).unexpected_keys == []
    with torch.no_grad():
        assert model(torch.randn(1, 3, 56, 56)).isfinite().all()


def test_meta_tensors_give_shapes():
    layer = XNormAttention(12, 3).to("meta")
    assert layer(torch.empty(2, 9, 12, device="meta")).shape == (2, 9, 12)


def t(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "arguments, mask, words",
    [
        ((t(4), t(5, 4), t(5, 4)), None, ["(4,)", "(..., tokens, channels)", "None"]),
        (
            (t(2, 3, 4), t(1, 5, 4), t(1, 5, 4)),
            None,
            ["(2, 3, 4)", "(1, 5, 4)", "same batch", "expand"],
        ),
        ((t(3, 4), t(5, 4), t(6, 4)), None, ["(5, 4)", "(6, 4)", "as many tokens"]),
        ((t(3, 4), t(5, 8), t(5, 4)), None, ["(3, 4)", "(5, 8)", "as many channels"]),
        (
            (t(3, 4, dtype=torch.int64), t(5, 4, dtype=torch.int64), t(5, 4, dtype=torch.int64)),
            None,
            ["int64", "float32", ".to("],
        ),
        ((t(3, 4), t(5, 4).double(), t(5, 4)), None, ["float32", "float64", ".to("]),
        ((t(3, 4), t(5, 4), t(5, 4)), t(5), ["float32", "torch.bool", "(5,)", "True where"]),
        ((t(3, 4), t(5, 4), t(5, 4)), t(3, dtype=torch.bool), ["(3,)", "(5,)"]),
        ((t(2, 3, 4), t(2, 5, 4), t(2, 5, 4)), t(5, dtype=torch.bool), ["(5,)", "(2, 5)"]),
    ],
)
def test_bad_input_to_a_function_says_what_and_what_to_do(function, arguments, mask, words):
    with pytest.raises(ValueError) as error:
        function(*arguments, key_padding_mask=mask)
    assert all(word in str(error.value) for word in ["got", "expected", *words]), error.value


@pytest.mark.parametrize("gamma", [t(4), t(5, 1), t(7, 1, 1)])
def test_a_gamma_that_does_not_fit_is_refused(gamma):
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    for gammas in ((gamma, 1.0), (1.0, gamma)):
        with pytest.raises(ValueError, match="got gamma of shape .* expected .* one number per"):
            xnorm_attention(q, k, v, *gammas)


def test_xnorm_refuses_integers_and_a_gamma_that_would_broadcast():
    with pytest.raises(ValueError, match="int64.*expected.*float"):
        xnorm(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2, 3, 1\).*\(3, 1\)"):
        xnorm(torch.randn(3, 4), gamma=t(2, 3, 1))


@pytest.mark.parametrize("module", MODULES)
def test_bad_input_to_a_module_says_what_and_what_to_do(module):
    for heads in (5, 0, -1):
        with pytest.raises(
            ValueError, match=rf"dim=12 and num_heads={heads}, expected.*\[1, 2, 3, 4, 6, 12\]"
        ):
            module(12, num_heads=heads)
    layer = module(12, num_heads=3)
    with pytest.raises(ValueError, match=r"\(2, 12, 4, 4\).*\(batch, tokens, 12\).*flatten"):
        layer(torch.randn(2, 12, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 9, 8\).*\(batch, tokens, 12\)"):
        layer(torch.randn(2, 9, 8))
    with pytest.raises(ValueError, match=r"\(9,\).*\(2, 9\)"):
        layer(torch.randn(2, 9, 12), key_padding_mask=torch.zeros(9, dtype=torch.bool))
    with pytest.raises(ValueError, match="float32.*torch.bool"):
        layer(torch.randn(2, 9, 12), key_padding_mask=torch.zeros(2, 9))


if importlib.util.find_spec("hypothesis"):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    # what a caller may combine: dtype and scale, sizes, layout in memory, mask
    cases = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(list(SCALES)),
            "place": st.tuples(*[st.floats(0, 1)] * 3),  # of q, k, v within the dtype's scales
            "batch": st.sampled_from([(), (1,), (2, 3)]),
            "sizes": st.tuples(*[st.integers(1, 40)] * 4),  # M, N, d, e
            "mean": st.sampled_from([0.0, 1.0]),
            "layout": st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
            "padded": st.floats(0, 0.9),
            "seed": st.integers(0, 2**31),
        }
    )

    def laid_out(x, layout):
        """The numbers of x in another place in memory."""
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "strided":
            return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
        if layout == "expanded" and x.ndim > 2:
            return x[:1].expand_as(x)
        return x

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(cases)
    def test_any_input_gives_what_the_loops_give(case):
        (M, N, d, e), dtype = case["sizes"], case["dtype"]
        random = torch.Generator().manual_seed(case["seed"])
        least, most = SCALES[dtype]
        inputs = []
        for tokens, channels, place in zip((M, N, N), (d, d, e), case["place"]):
            x = torch.randn(*case["batch"], tokens, channels, generator=random).double()
            x = x + case["mean"]
            x = x.where(x.abs() > 0.05, 0.05) * 10.0 ** (least + place * (most - least))
            inputs.append(laid_out(x.to(dtype), case["layout"]))
        q, k, v = inputs
        mask = torch.rand(*case["batch"], N, generator=random) < case["padded"]
        mask[..., 0] = False  # one token at least is there
        kept = ~mask.unsqueeze(-1)
        expected = loop_xnorm_attention(q, k.double() * kept, v.double() * kept)
        out = xnorm_attention(q, k, v, key_padding_mask=mask)
        assert out.shape == (*case["batch"], M, e) and out.dtype == dtype
        # where keys and values cancel, kᵀv has rounding errors of the size of its terms
        size = (k.double().abs() * kept).mT @ (v.double().abs() * kept)
        left = ((k.double() * kept).mT @ (v.double() * kept)).norm(dim=-2, keepdim=True)
        lost = (size.norm(dim=-2, keepdim=True) / left).clamp(1, 1e6)
        tolerance = TOLERANCE.get(dtype, 1e-12)
        error = (out.double() - expected).abs() / lost
        assert error.max() < 2 * tolerance

else:

    @pytest.mark.skip(reason="needs hypothesis: pip install hypothesis")
    def test_any_input_gives_what_the_loops_give():
        pass
