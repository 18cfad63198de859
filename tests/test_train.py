"""The training loop (recipe.py, record.py, train.py): what it computes, and runs that are killed, damaged or split."""

import errno
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_records import problems_in_records

from xvit_minimal import data, record, train
from xvit_minimal.model import XViT
from xvit_minimal.optimization import learning_rate, parameter_groups
from xvit_minimal.recipe import build, recipe
from xvit_minimal.tasks import Classification

TINY = dict(
    limit=64,
    batch_size=16,
    epochs=3,
    dim=8,
    depth=1,
    num_heads=2,
    save_steps=1,
    eval_epochs=3,
    drop_path=0.1,
    mix=0.4,
    device="cpu",
)  # 12 steps, with every source of randomness


def tiny(folder, **changes):
    return recipe("shapes", **{**TINY, "out": str(folder), **changes})


def weights(folder):
    return (folder / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train.train(tiny(folder))
    return folder


def run_of(folder, **changes):
    """A Run in this process that has not begun."""
    config = tiny(folder, amp=False, compile=False, **changes)
    return train.Run(
        config,
        data.load("shapes", "train", limit=config.limit),
        data.shapes(40, seed=1),
        torch.device("cpu"),
    )


# --------------------------------------------------------------------------------------------------------------- step


def test_a_step_is_adamw_on_the_smoothed_loss_and_moves_the_average(tmp_path):
    run = run_of(tmp_path, mix=0.0, drop_path=0.0, augment="none", label_smoothing=0.1, ema=0.9)
    twin = build(run.config, 4, 32)
    twin.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(twin, 0.05), lr=1.0)
    average = None
    for n in range(2):
        index = run.batches()[0]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(n, run.config, run.steps)
        logits = twin.train()(data.normalize(run.train_set.images[index]))
        target = F.one_hot(run.train_set.labels[index], 4) * 0.9 + 0.1 / 4
        optimizer.zero_grad()
        (-(target * logits.log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
        run.train_step(index)
        now = [t.detach().clone() for t in (*twin.parameters(), *twin.buffers())]
        average = (
            now
            if average is None
            else [
                2 / 11 * a + 9 / 11 * b if b.is_floating_point() else None  # the decay rises to 0.9
                for a, b in zip(average, now)
            ]
        )
    for a, b in zip(run.model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip((*run.ema.module.parameters(), *run.ema.module.buffers()), average):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert run.step == 2


def test_mixing_ends_with_its_share_of_the_epochs(tmp_path, monkeypatch):
    run, seen = run_of(tmp_path, mix=0.5, epochs=4), []
    mix = run.task.mix
    run.task.mix = lambda x, y: (seen.append(run.epoch), mix(x, y))[1]
    while run.epoch < 4:
        for index in run.batches():
            run.train_step(index)
    assert seen == [0] * run.steps + [1] * run.steps


def test_an_epoch_sees_every_image_once_and_no_two_epochs_in_the_same_order(tmp_path):
    run = run_of(tmp_path)
    first = torch.cat(run.batches())
    assert sorted(first.tolist()) == list(range(64))
    run.step = 2
    assert torch.equal(
        torch.cat(run.batches()), first[32:]
    )  # the rest of an epoch that was interrupted
    run.step = run.steps
    assert not torch.equal(torch.cat(run.batches()), first)


def test_evaluate_is_the_mean_over_all_images():
    torch.manual_seed(0)
    model, images = (
        XViT(img_size=32, num_classes=4, dim=8, depth=1, num_heads=2, stem_stride=8),
        data.shapes(23),
    )
    with torch.no_grad():
        logits = model.eval()(data.normalize(images.images))
    found = Classification.evaluate(model.train(), images, batch_size=7)
    assert found["top1"] == pytest.approx(
        (logits.argmax(1) == images.labels).double().mean().item()
    )
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_weights_a_record_and_a_checkpoint(tree, whole):
    assert {p.name for p in whole.iterdir()} == {
        "weights.safetensors",
        "record.json",
        "checkpoint.pt",
        "checkpoint.previous.pt",
    }
    found = json.loads((whole / "record.json").read_text())
    assert (
        len(found["epochs"]) == 3
        and found["results"][0]["test_top1"] == found["epochs"][-1]["test_top1"]
    )
    assert (
        found["data"]["splits"] == {"train": 64, "test": 2000} and "seed 1" in found["data"]["copy"]
    )
    found = {
        **found,
        "command": "python -m xvit_minimal.train",
        "commit": found["commit"] or "0123abc",
        "config": {**found["config"], "out": "runs/x"},
    }  # the folder of this run is on this machine
    found["commit"] = found["commit"].removesuffix("-dirty")
    (tree / "book/runs/two.json").write_text(json.dumps(found))
    assert not problems_in_records(tree)


def test_a_checkpoint_trains_and_classifies_in_a_fresh_process(whole):
    code = (
        "import sys; from xvit_minimal import data, train\n"
        "model, classes = train.load_model(sys.argv[1])\n"
        "print(classes[model(data.normalize(data.shapes(1).images)).argmax()], model.training)"
    )
    words = subprocess.run(
        [sys.executable, "-c", code, whole / "weights.safetensors"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert words.stdout.split()[0] in data.KINDS and words.stdout.split()[1] == "False"


def test_the_weights_are_the_averaged_ones(whole):
    model, classes = train.load_model(whole / "weights.safetensors")
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert all(
        torch.equal(value, state["ema"][f"module.{name}"])
        for name, value in model.state_dict().items()
    )
    assert tuple(classes) == data.KINDS


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"PK\x03\x04", (8).to_bytes(8, "little") + b"{}      "]
)
def test_a_file_that_holds_no_model_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="w.safetensors is not a weights.safetensors"):
        train.load_model(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError):
        train.load_model(tmp_path / "gone.safetensors")


def test_provenance_says_what_ran_where():
    found = record.provenance("cpu")
    assert (
        found["versions"]["torch"] == torch.__version__
        and found["hardware"]["cores"] == torch.get_num_threads()
    )
    assert found["hardware"]["gpu"] is None and found["hardware"]["cpu"]


def test_every_generator_goes_back_to_where_it_was():
    state = record.random_state()
    first = torch.rand(3), np.random.rand(), np.random.normal(), random.random()
    record.set_random_state(state)
    again = torch.rand(3), np.random.rand(), np.random.normal(), random.random()
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    record.write(path, b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        record.write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# ------------------------------------------------------------------------------------------------- going on after a stop

# A process that trains and kills itself with SIGKILL: before a given step, after so many seconds, or inside the write of
# the checkpoint: when half of it is on the disk, and between the two renames.
KILLED = """
import json, os, signal, sys, threading
import torch
from xvit_minimal import record, recipe, train
how, number, config = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
kill, count = lambda: os.kill(os.getpid(), signal.SIGKILL), [0]

def counted(function, suffix=""):
    def call(*args, **more):
        if suffix in str(args[0]):
            count[0] += 1
            if count[0] == number:
                if how == "write":
                    with open(f"{args[0]}.part", "wb") as file:
                        file.write(bytes(args[1])[: len(args[1]) // 2])
                kill()
        return function(*args, **more)
    return call

if how == "step":
    train.Run.train_step = counted(train.Run.train_step)
elif how == "write":
    train.write = counted(train.write, "checkpoint.pt")
elif how == "rename":
    record.Path.replace = counted(record.Path.replace, "checkpoint.pt.part")
elif how == "seconds":
    threading.Timer(number, kill).start()
train.train(recipe.Config(**config))
"""


def killed(config, how, number):
    config = json.dumps(vars(config))
    return subprocess.run(
        [sys.executable, "-c", KILLED, how, str(number), config], capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_killed_run_ends_with_the_same_bytes(whole, tmp_path):
    """Killed before a step, half-way through writing a checkpoint, between its two renames, and at a random moment."""
    config = tiny(tmp_path)
    draw = random.Random()
    blows = [
        ("step", draw.randint(2, 4)),
        ("write", draw.randint(1, 3)),
        ("rename", draw.randint(1, 3)),
        ("seconds", draw.uniform(0.0, 0.5)),
    ]
    for how, number in blows:
        ended = killed(config, how, number)
        assert ended.returncode == -signal.SIGKILL or how == "seconds", (blows, ended.stderr)
    assert train.train(config)["results"][0]["test_top1"] >= 0, blows
    assert weights(tmp_path) == weights(whole), blows
    mine, other = (json.loads((folder / "record.json").read_text()) for folder in (tmp_path, whole))
    assert [row["train_loss"] for row in mine["epochs"]] == [
        row["train_loss"] for row in other["epochs"]
    ]


def stop_at(step, monkeypatch, number):
    whole = train.Run.train_step

    def train_step(run, index):
        whole(run, index)
        if run.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Run, "train_step", train_step)


@pytest.mark.parametrize("step, number", [(6, signal.SIGINT), (8, signal.SIGTERM)])
def test_ctrl_c_ends_after_the_step_and_the_same_command_goes_on(
    whole, tmp_path, monkeypatch, step, number
):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(step, patch, number)
        train.train(tiny(tmp_path, save_steps=100))
    assert signal.getsignal(number) == handler
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step
    with pytest.raises(
        ValueError, match="save_steps is 100 there and 1 here.*choose another --out"
    ):
        train.train(tiny(tmp_path))
    train.train(tiny(tmp_path, save_steps=100))
    assert tensors(tmp_path) == tensors(whole)  # the bytes before them hold save_steps as well


def tensors(folder):
    content = weights(folder)
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_a_finished_run_is_left_as_it_is(whole, capsys):
    before = weights(whole)
    assert train.train(tiny(whole))["epochs"][-1]["epoch"] == 3
    assert weights(whole) == before and "going on after step 12" in capsys.readouterr().out


def half_done(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(6, patch, signal.SIGINT)
        train.train(tiny(folder))
    return folder / "checkpoint.pt"


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", ["truncated", "empty", "foreign", "hostile", "hostile pickle"])
def test_a_checkpoint_that_is_none_is_refused_and_the_one_before_it_used(
    whole, tmp_path, monkeypatch, capsys, what
):
    path = half_done(tmp_path, monkeypatch)
    if what == "foreign":
        torch.save({"model": {}}, path)
    elif what == "hostile":
        torch.save(
            {**torch.load(path, weights_only=True), "history": Hostile(tmp_path / "taken")}, path
        )
    elif what == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(tmp_path / "taken")))
    else:
        path.write_bytes(path.read_bytes()[: 20_000 if what == "truncated" else 0])
    train.train(tiny(tmp_path))
    assert (
        "refused" in (out := capsys.readouterr().out)
        and "checkpoint.pt" in out
        and "going on after step 5" in out
    )
    assert weights(tmp_path) == weights(whole) and not (tmp_path / "taken").exists()
    assert (tmp_path / "checkpoint.refused.pt").exists()


def test_with_no_checkpoint_left_to_use_nothing_is_overwritten(tmp_path, monkeypatch):
    path = half_done(tmp_path, monkeypatch)
    for name in (path, path.with_name("checkpoint.previous.pt")):
        name.write_bytes(b"broken")
    with pytest.raises(ValueError, match="move it away to start anew"):
        train.train(tiny(tmp_path))
    assert path.read_bytes() == b"broken"


def test_a_full_disk_keeps_the_last_good_checkpoint(whole, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(
            os,
            "fsync",
            lambda file: calls.append(0) or (full_disk() if len(calls) == 6 else fsync(file)),
        )
        train.train(tiny(tmp_path))
    assert not list(tmp_path.glob("*.part"))
    train.train(tiny(tmp_path))
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("step", [2, 3, 12])
def test_a_loss_that_is_no_number_ends_the_run_and_spoils_nothing(tmp_path, monkeypatch, step):
    """In the middle, in the step before a checkpoint, and in the last step of all."""
    whole, good = train.Run.train_step, []

    def train_step(run, index):
        whole(run, index)
        if run.step == step:
            next(run.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    with pytest.raises(FloatingPointError, match=f"not finite after step {step}: lower --lr"):
        train.train(tiny(tmp_path, eval_epochs=1))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == step - 1 and all(t.isfinite().all() for t in state["model"].values())
    if step == 12:
        model, _ = train.load_model(tmp_path / "weights.safetensors")
        assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ the command line


def shell(*words, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": str(train.Path(train.__file__).parent.parent),
            **environment,
        },
    )


def test_a_folder_that_is_no_data_set_ends_with_one_line(tmp_path):
    (tmp_path / "photos").mkdir()
    ended = shell("xvit_minimal.train", "--data", str(tmp_path / "photos"), cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and "photos" in ended.stderr
    assert "Traceback" not in ended.stderr and not list(tmp_path.glob("runs/*/*"))


TINY_WORDS = "--limit 64 --batch-size 16 --epochs 2 --dim 8 --depth 1 --num-heads 2 --augment none --device cpu".split()


def test_two_processes_compute_what_one_does(tmp_path):
    """Same batches, gradients averaged, BatchNorm over both: same losses and weights, within rounding."""
    one = shell(
        "xvit_minimal.train", *TINY_WORDS, "--out", "one", cwd=tmp_path, OMP_NUM_THREADS="1"
    )
    two = shell(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "xvit_minimal.train",
        *TINY_WORDS,
        "--out",
        "two",
        cwd=tmp_path,
        OMP_NUM_THREADS="1",
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert (
        one.stderr == "" and one.stdout.count("epoch") == 2 and two.stdout.count("epoch") == 2
    )  # no bar, no echo
    first, second = (
        json.loads((tmp_path / name / "record.json").read_text())["epochs"]
        for name in ("one", "two")
    )
    for a, b in zip(first, second):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)
    for a, b in zip(
        *(
            train.load_model(tmp_path / name / "weights.safetensors")[0].state_dict().values()
            for name in ("one", "two")
        )
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    again = shell("xvit_minimal.train", *TINY_WORDS, "--out", "two", cwd=tmp_path)
    assert again.returncode == 1 and "2 processes there and 1 here" in again.stderr
