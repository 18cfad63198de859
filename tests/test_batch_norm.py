"""SyncBatchNorm2d: two processes compute what one does, near zero and far from it."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from xvit_minimal.distributed import SyncBatchNorm2d, synchronize_batch_norms

PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from xvit_minimal.distributed import synchronize_batch_norms

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
results = []
for case in torch.load(f"{folder}/cases.pt", weights_only=True):
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.load_state_dict(case["state"])
    synchronize_batch_norms(model)
    x = case["x"][rank].requires_grad_()
    out = model(x)
    (out * case["toward"][rank]).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    results.append(dict(out=out.detach(), x=x.grad, gradients=gradients, state=model.state_dict()))
torch.save(results, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""
CASES = {  # mean and deviation of the input
    "usual": (0.5, 2.0),
    "far from zero": (1e4, 1.0),
    "narrow": (100.0, 0.01),
    "constant": (3.0, 0.0),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each case the whole batch and what each of two processes made of its part of it."""
    folder, cases = tmp_path_factory.mktemp("processes"), []
    torch.manual_seed(0)
    for mean, deviation in CASES.values():
        x, toward = mean + deviation * torch.randn(7, 3, 4, 5), torch.randn(7, 3, 4, 5)
        norm = nn.Sequential(nn.BatchNorm2d(3))
        nn.init.normal_(norm[0].weight), nn.init.normal_(norm[0].bias)
        parts = {"x": x.split((5, 2)), "toward": toward.split((5, 2))}  # unequal batches
        cases.append({"state": norm.state_dict(), **{k: list(v) for k, v in parts.items()}})
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-c", PROCESS, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    assert [process.wait(120) for process in processes] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return {name: (case, *both) for name, case, *both in zip(CASES, cases, *found)}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(results, name):
    case, *parts = results[name]
    # the reference in float64, as float32 itself is off by 1e-3 where 100 varies by 0.01
    one = nn.Sequential(nn.BatchNorm2d(3)).double()
    one.load_state_dict(case["state"])
    x = torch.cat(case["x"]).detach().double().requires_grad_()
    out = one(x)
    (out * torch.cat(case["toward"])).sum().backward()
    close = dict(rtol=2e-3, atol=2e-3)

    def whole(key):
        return torch.cat([part[key] for part in parts]).double()

    torch.testing.assert_close(whole("out"), out.detach(), **close)
    scale = x.grad.abs().max().item()
    torch.testing.assert_close(whole("x"), x.grad, rtol=2e-3, atol=2e-3 * scale)
    for mine, other in zip(parts[0]["gradients"], [p.grad for p in one.parameters()]):
        torch.testing.assert_close(mine.double(), other, rtol=2e-3, atol=2e-2)
    for part in parts:
        for key, value in one.state_dict().items():
            torch.testing.assert_close(
                part["state"][key].to(value.dtype), value, rtol=1e-5, atol=1e-6
            )


def test_parameters_and_buffers_stay_and_their_names_too():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, 1e-3, 0.3)), nn.ReLU()
    )
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    synchronize_batch_norms(model.eval())
    norm = model[1][0]
    assert type(norm) is SyncBatchNorm2d and (norm.eps, norm.momentum) == (1e-3, 0.3)
    assert not norm.training
    found = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(found) == list(tensors) and all(found[name] is tensors[name] for name in tensors)


@pytest.fixture
def alone(tmp_path):
    """This process as the only one of its group."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_value_is_refused_before_it_makes_the_variance_nan(alone):
    norm = SyncBatchNorm2d(3)
    with pytest.raises(ValueError, match="got one value per channel in training, expected two"):
        norm(torch.ones(1, 3, 1, 1))
    assert norm.running_var.equal(torch.ones(3)) and norm(torch.randn(2, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_in_another_precision(alone, kind):
    norm, x = SyncBatchNorm2d(3).to(kind), (3 + torch.randn(4, 3, 5, 5)).to(kind)
    plain = nn.BatchNorm2d(3)
    torch.testing.assert_close(norm(x), plain(x.float()).to(kind), rtol=1e-2, atol=2e-2)
    for name in ("running_mean", "running_var"):
        found, expected = getattr(norm, name), getattr(plain, name)
        assert found.dtype == kind
        torch.testing.assert_close(found, expected.to(kind), rtol=1e-2, atol=1e-2)
