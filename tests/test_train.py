"""The training loop (run.py, train.py, memory.py): what it computes, and what a run leaves."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_records import problems_in_records

from xvit_minimal import data, each_picture, memory, record, train
from xvit_minimal.dense import VOID
from xvit_minimal.model import XViT
from xvit_minimal.optimization import has_muon, learning_rate, parameter_groups
from xvit_minimal.recipe import build, recipe
from xvit_minimal.run import cut
from xvit_minimal.tasks import TASKS, Classification

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


def few(config, split, limit):
    """Drawn shapes as ever to train on, and few of them to score."""
    return data.load(config.data, split, config.size, limit or (40 if split != "train" else None))


@pytest.fixture(scope="module", autouse=True)
def few_to_score():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "load", staticmethod(few))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train.train(tiny(folder))
    return folder


def run_of(folder, task="classification", **changes):
    """A Run in this process that has not begun."""
    usual = {**TINY, "out": str(folder), "amp": False, "compile": False}
    if task != "classification":
        usual |= dict(mix=0.0, stem_stride=8, size=32)
    config = recipe("shapes", task, **{**usual, **changes})
    sets = {split: TASKS[task].load(config, split, config.limit) for split in ("train", "test")}
    return train.Run(config, sets, torch.device("cpu"))


# -------------------------------------------------------------------------------------------- step


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
        if average is None:
            average = now
        else:  # the decay has risen to 2 / 11 only
            pairs = zip(average, now)
            average = [2 / 11 * a + 9 / 11 * b if b.is_floating_point() else None for a, b in pairs]
    for a, b in zip(run.model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip((*run.ema.module.parameters(), *run.ema.module.buffers()), average):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert run.step == 2


@pytest.mark.skipif(not has_muon(), reason="this torch has no Muon")
def test_muon_turns_a_block_s_matrices_and_adamw_changes_everything_else(tmp_path):
    run = run_of(tmp_path, optimizer="muon", weight_decay=0.0, lr=0.01, final_lr=0.01, warmup=0.0)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train_step(run.batches()[0])
    for name, parameter in run.model.named_parameters():
        change = parameter.detach() - before[name]
        if "blocks." in name and parameter.ndim == 2:
            scale = 0.2 * 0.01 * max(change.shape) ** 0.5  # so that an entry is 0.2 lr on average
            lengths = torch.linalg.svdvals(change) / scale
            # five steps of Newton-Schulz leave only the smallest singular values behind
            assert lengths.median() > 0.5 and lengths.max() < 1.5, name
        elif change.any():
            assert change.abs().max() == pytest.approx(0.01, rel=0.01), name  # AdamW's first step


def test_muon_where_torch_has_none_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="has no Muon.*--optimizer adamw"):
        train.train(tiny(tmp_path / "run", optimizer="muon"))
    assert not (tmp_path / "run").exists()


def test_small_images_come_first(tmp_path):
    run = run_of(tmp_path, small=0.5, epochs=4)
    sides = [
        run.task.batch(run.train_set, torch.arange(4), epoch, run.device)[0].shape[-1]
        for epoch in range(4)
    ]
    assert sides == [24, 24, 32, 32]


def test_what_was_noted_while_data_were_read_is_printed_and_recorded(tmp_path, capsys, monkeypatch):
    def load(config, split, limit):
        return replace(few(config, split, limit), notes=(f"one of {split} is odd",))

    monkeypatch.setattr(Classification, "load", staticmethod(load))
    found = train.train(tiny(tmp_path, epochs=1))
    notes = ["train: one of train is odd", "val: one of val is odd", "test: one of test is odd"]
    assert found["data"]["notes"] == notes
    assert capsys.readouterr().out.splitlines()[:3] == notes


def test_mixing_ends_with_its_share_of_the_epochs(tmp_path):
    run, seen = run_of(tmp_path, mix=0.5, epochs=4), []
    mix = run.task.mix
    run.task.mix = lambda x, y: (seen.append(run.epoch), mix(x, y))[1]
    while run.epoch < 4:
        for index in run.batches():
            run.train_step(index)
    assert seen == [0] * run.steps + [1] * run.steps


@pytest.mark.parametrize(
    "limit, sizes",
    [
        (64, [16] * 4),
        (68, [16] * 4 + [4]),
        (65, [16, 16, 16, 17]),
        (66, [16] * 4 + [2]),
        (12, [12]),
    ],
)
def test_an_epoch_sees_every_image_once_and_the_last_batch_is_smaller(tmp_path, limit, sizes):
    """But for a last batch of one picture, too few for BatchNorm: it joins the one before."""
    run = run_of(tmp_path, limit=limit // 4 * 4)
    run.train_set = data.shapes(limit)
    batches = run.order(0)
    assert [len(index) for index in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(limit))


def test_no_two_epochs_have_the_same_order_and_an_interrupted_one_has_its_rest(tmp_path):
    run = run_of(tmp_path)
    first = torch.cat(run.batches())
    run.step = 2
    assert torch.equal(torch.cat(run.batches()), first[32:])
    run.step = run.steps
    assert not torch.equal(torch.cat(run.batches()), first)


def test_the_loss_of_an_epoch_is_the_mean_over_its_pictures(tmp_path, monkeypatch):
    """Batches of 16 and a last one of 4: their losses do not count alike."""
    run, told = run_of(tmp_path, limit=20), iter([1.0, 3.0])
    zero = next(run.model.parameters()).flatten()[0]
    monkeypatch.setattr(run.task, "loss", lambda net, batch: next(told) + 0 * zero)
    monkeypatch.setattr(run.task, "evaluate", lambda *_: {"top1": 0.5})
    for index in run.batches():
        run.train_step(index)
    run.finish_epoch()
    assert run.history[0]["train_loss"] == pytest.approx((16 * 1 + 4 * 3) / 20)


# ------------------------------------------------------------------------------------ micro-batches


def fix_batch_norms(run):
    """BatchNorm with its running statistics: those of a batch are a micro-batch's."""
    for module in run.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
@pytest.mark.parametrize("at_once", [2, 3, 5, 7, 16])
def test_micro_batches_give_the_gradient_of_the_whole_step(tmp_path, task, at_once):
    """16 pictures, the masks of some of them void for the most part: a mean over pixels."""
    gradients = []
    for micro_batch in (16, at_once):
        run = run_of(tmp_path, task, drop_path=0.0, micro_batch=micro_batch)
        if task == "segmentation":
            run.train_set.masks[::3, 4:] = VOID
        fix_batch_norms(run)
        if task != "detection":  # its head computes in float32
            run.model.double()
            whole = run.task.batch
            run.task.batch = lambda *args, whole=whole: in_float64(whole(*args))
            run.task.loss = lambda net, batch, task=run.task: loss_in_float64(task, net, batch)
        torch.manual_seed(0)
        assert run._gradient(run.batches()[0], ()) is not None
        gradients.append([p.grad.clone() for p in run.model.parameters() if p.grad is not None])
    scale = max(g.abs().max() for g in gradients[0])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() < (1e-4 if task == "detection" else 1e-6) * scale


def in_float64(batch):
    x, *rest = batch
    return x.double(), *rest


def loss_in_float64(task, net, batch):
    x, *rest = batch
    if isinstance(task, Classification):
        return F.cross_entropy(net(x), rest[0])
    logits, masks = net(x), rest[0].long()
    total = F.cross_entropy(logits, masks, ignore_index=VOID, reduction="sum")
    return total / (masks != VOID).sum().clamp(min=1)


def test_micro_batches_do_not_change_what_a_step_draws(tmp_path):
    """The augmented and mixed pictures of two steps, whatever the model draws in between."""
    seen = {}
    for at_once in (16, 3):
        run = run_of(tmp_path, micro_batch=at_once)
        batch, kept = run.task.batch, seen.setdefault(at_once, [])
        run.task.batch = lambda *args, b=batch, k=kept: k.append(b(*args)) or k[-1]
        for index in run.batches()[:2]:
            run.train_step(index)
    for (x, labels), (other_x, other_labels) in zip(seen[16], seen[3]):
        assert torch.equal(x, other_x) and torch.equal(labels, other_labels)
    assert not torch.equal(seen[3][0][0], seen[3][1][0])


@pytest.mark.parametrize("count, sizes", [(1, [7]), (2, [4, 3]), (3, [3, 2, 2]), (7, [1] * 7)])
def test_parts_differ_by_one_picture_at_most(count, sizes):
    batch = torch.arange(7), list(range(7)), None
    parts = cut(batch, count)
    assert [len(part[0]) for part in parts] == [len(part[1]) for part in parts] == sizes
    assert torch.cat([part[0] for part in parts]).tolist() == batch[1]
    assert all(part[2] is None for part in parts)


def test_a_step_that_is_cut_short_changes_nothing(tmp_path):
    run, asked = run_of(tmp_path, micro_batch=4), []
    run.train_step(run.batches()[0], asked)
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    loss = run.task.loss
    run.task.loss = lambda *args: (asked.append(1), loss(*args))[1]
    assert not run.train_step(run.batches()[0], asked) and len(asked) == 1 and run.step == 1
    assert all(torch.equal(t, before[name]) for name, t in run.model.state_dict().items())


def test_a_step_takes_as_many_pictures_as_its_room_holds():
    assert memory.micro_batch(512, 37e6, 50e9) == 512
    assert memory.micro_batch(512, 37e6, 4e9) == int(4e9 / 1.5 / 37e6) == 72
    assert memory.micro_batch(512, 37e6, 1e6) == 2 and memory.micro_batch(512, 37e6, None) == 512


def test_a_step_takes_half_of_the_free_memory_and_on_a_cpu_2_gb(monkeypatch):
    for free, cpu, gpu in ((3e9, 1.5e9, 1.5e9), (50e9, 2e9, 25e9), (None, None, None)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.room_for_a_step("cpu") == cpu and memory.room_for_a_step("cuda") == gpu


def test_a_machine_with_little_memory_computes_a_step_in_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_200_000)
    run = run_of(tmp_path, model="xvit_pico")
    kept = memory.memory_per_picture(
        run.task, run.model, run.task.batch(run.train_set, torch.arange(2), 0, run.device)
    )
    assert run.micro_batch == max(2, int(600_000 / 1.5 / kept)) < 16
    assert f"16 pictures are computed {run.micro_batch} at a time" in capsys.readouterr().out


def test_what_a_picture_keeps_is_counted_without_touching_the_model():
    """A linear map keeps its input, 4 x 1,000 bytes a picture, and a square what it squares."""

    class Squares:
        @staticmethod
        def loss(net, batch):
            return net(batch[0]).square().mean()

    net = torch.nn.Sequential(torch.nn.Linear(1000, 500), torch.nn.BatchNorm1d(500))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    kept = memory.memory_per_picture(Squares, net, (torch.randn(64, 1000),))
    assert 4 * 2000 <= kept < 4 * 2000 * 1.1
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize(
    "version, limit, used", [(2, "memory.max", "memory.current"), (1, None, None)]
)
def test_a_container_limit_counts(tmp_path, monkeypatch, version, limit, used):
    """In version 1 the files have other names; "max" and a missing folder are no limit."""
    limit, used = limit or "memory.limit_in_bytes", used or "memory.usage_in_bytes"
    root = tmp_path / ("cgroup" if version == 2 else "cgroup/memory")
    (root / "job/step").mkdir(parents=True)
    (root / "job" / limit).write_text("1000\n")
    (root / "job" / used).write_text("700\n")
    (root / "job/memory.stat").write_text("anon 5\ninactive_file 100\n")
    (root / "job/step" / limit).write_text("max\n")
    line = "0::/job/step\n" if version == 2 else "7:cpu,cpuacct:/x\n4:memory:/job/step\n"
    (tmp_path / "self").write_text(line)
    paths = {"/proc/self/cgroup": tmp_path / "self", "/sys/fs/cgroup": tmp_path / "cgroup"}
    paths["/sys/fs/cgroup/memory"] = tmp_path / "cgroup/memory"
    monkeypatch.setattr(memory, "Path", lambda path: paths[str(path)])
    assert memory._control_group_rooms() == [400]


def test_free_memory_is_known_here_and_not_more_than_there_is():
    if sys.platform == "win32":
        pytest.skip("nothing tells on Windows")
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free_memory("cpu") <= there and memory.free_memory("meta") is None


# ------------------------------------------------------------------------------------------ scores


def test_evaluate_is_the_mean_over_all_images():
    torch.manual_seed(0)
    model = XViT(img_size=32, num_classes=4, dim=8, depth=1, num_heads=2, stem_stride=8)
    images = data.shapes(23)
    with torch.no_grad():
        logits = model.eval()(data.normalize(images.images))
    found = Classification.evaluate(model.train(), images, batch_size=7)
    right = (logits.argmax(1) == images.labels).double().mean().item()
    assert found["top1"] == pytest.approx(right)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)


def looks(monkeypatch):
    """The list of (split, epoch) at which a run looks at its sets."""
    seen, scores = [], train.Run.scores

    def noted(run, split):
        seen.append((split, run.epoch))
        return scores(run, split)

    monkeypatch.setattr(train.Run, "scores", noted)
    return seen


def test_epochs_are_scored_on_validation_and_the_test_set_is_looked_at_once(tmp_path, monkeypatch):
    seen = looks(monkeypatch)
    found = train.train(tiny(tmp_path, eval_epochs=2))
    assert seen == [("val", 2), ("val", 3), ("test", 3)]
    assert [set(row) & {"val_top1", "test_top1"} for row in found["epochs"]] == [
        set(),
        {"val_top1"},
        {"val_top1"},
    ]
    scores = {"epoch", "test_top1", "test_loss", "test_top1_flip", "test_hits"}
    assert set(found["results"][0]) == scores
    assert set(found["data"]["splits"]) == {"train", "val", "test"}
    train.train(tiny(tmp_path, eval_epochs=2))
    assert len(seen) == 3  # a run that has ended looks at nothing again


def test_without_a_holdout_all_is_trained_on_and_only_the_end_is_scored(tmp_path, monkeypatch):
    seen = looks(monkeypatch)
    found = train.train(tiny(tmp_path, holdout=False))
    assert seen == [("test", 3)] and set(found["data"]["splits"]) == {"train", "test"}
    assert not any(key.startswith(("val_", "test_")) for row in found["epochs"] for key in row)
    assert "--no-holdout" in found["command"] and "test_top1" in found["results"][0]


def test_a_score_that_is_no_number_is_null_and_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    nothing = {"top1": math.nan, "other": math.inf, "good": 0.5}
    monkeypatch.setattr(Classification, "evaluate", staticmethod(lambda *_: nothing))
    monkeypatch.setitem(each_picture.DETAILS, "classification", lambda *_: {})
    found = train.train(tiny(tmp_path, epochs=1))
    wanted = {"epoch": 1, "test_top1": None, "test_other": None, "test_good": 0.5}
    assert found["results"] == [wanted] and "val top1 not a number" in capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text()) == found


def test_a_loss_of_nan_on_validation_keeps_the_good_weights(tmp_path, monkeypatch):
    good, evaluate = [], Classification.evaluate

    def later_nan(model, *rest):
        found = evaluate(model, *rest)
        if good:
            return {**found, "loss": math.nan}
        good.append({name: t.clone() for name, t in model.state_dict().items()})
        return found

    monkeypatch.setattr(Classification, "evaluate", staticmethod(later_nan))
    with pytest.raises(FloatingPointError, match="loss on the val pictures is not finite"):
        train.train(tiny(tmp_path, eval_epochs=1))
    model, _ = train.load_model(tmp_path / "weights.safetensors")
    assert all(torch.equal(t, good[0][name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("what", ["parameter", "running_var"])
@pytest.mark.parametrize("step", [2, 3, 12])
def test_a_loss_that_is_no_number_ends_the_run_and_spoils_nothing(
    tmp_path, monkeypatch, step, what
):
    """In the middle, in the step before a checkpoint, and in the last step of all."""
    whole = train.Run.train_step

    def train_step(run, *args):
        whole(run, *args)
        if run.step == step and what == "parameter":
            next(run.model.parameters()).data.fill_(math.nan)
        elif run.step == step:
            next(b for b in run.model.buffers() if b.is_floating_point()).fill_(math.nan)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    with pytest.raises(FloatingPointError, match=f"not finite after step {step}: lower --lr"):
        train.train(tiny(tmp_path, eval_epochs=1))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == step - 1
    assert all(t.isfinite().all() for t in state["model"].values())
    if step == 12:
        model, _ = train.load_model(tmp_path / "weights.safetensors")
        assert all(t.isfinite().all() for t in model.state_dict().values())


# ------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_weights_a_record_and_a_checkpoint(tree, whole):
    assert {p.name for p in whole.iterdir()} == {
        "weights.safetensors",
        "record.json",
        "checkpoint.pt",
        "checkpoint.previous.pt",
    }
    found = json.loads((whole / "record.json").read_text())
    assert len(found["epochs"]) == 3 and found["results"][0]["epoch"] == 3
    assert found["data"]["splits"] == {"train": 64, "val": 40, "test": 40}
    assert "test: generated, seed 1" in found["data"]["copy"]
    found["command"], found["config"]["out"] = "python -m xvit_minimal.train", "runs/x"
    found["commit"] = (found["commit"] or "0123abc").removesuffix("-dirty")
    (tree / "book/runs/two.json").write_text(json.dumps(found))
    assert not problems_in_records(tree)


def test_the_weights_are_the_averaged_ones(whole):
    model, classes = train.load_model(whole / "weights.safetensors")
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert all(
        torch.equal(value, state["ema"][f"module.{name}"])
        for name, value in model.state_dict().items()
    )
    assert tuple(classes) == data.KINDS


def test_provenance_says_what_ran_where():
    found = record.provenance("cpu")
    assert found["versions"]["torch"] == torch.__version__
    assert type(found["versions"]["torch"]) is str
    assert found["hardware"]["cores"] == torch.get_num_threads()
    assert found["hardware"]["gpu"] is None and found["hardware"]["cpu"]


# -------------------------------------------------------------------------------- the command line


def start(*words, cwd, **environment):
    """A process of `python -m`, with what it prints in pipes."""
    package = str(train.Path(train.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **environment},
    )


def shell(*words, cwd, **environment):
    """(exit code, stdout, stderr) of a process that ends by itself."""
    process = start(*words, cwd=cwd, **environment)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def test_a_folder_that_is_no_data_set_ends_with_one_line(tmp_path):
    (tmp_path / "photos").mkdir()
    code, _, err = shell("xvit_minimal.train", "--data", str(tmp_path / "photos"), cwd=tmp_path)
    assert code == 1 and err.startswith("error: ") and "photos" in err
    assert "Traceback" not in err and not list(tmp_path.glob("runs/*/*"))


def test_a_device_that_is_not_here_ends_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "load", None)
    for device in ("cuda", "cuda:1", "mps", "xpu"):
        there = getattr(torch, device.partition(":")[0]).is_available()
        if not there:
            with pytest.raises(ValueError, match=f"--device {device}.*leave --device out"):
                train.train(tiny(tmp_path, device=device))
    assert not list(tmp_path.iterdir())


TINY_WORDS = (
    "--limit 64 --batch-size 16 --epochs 2 --dim 8 --depth 1 --num-heads 2 --augment none "
    "--optimizer adamw --no-amp --device cpu"
).split()


def test_a_program_without_a_terminal_for_complaints_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw, or after 2>&-
    assert len(train.train(tiny(tmp_path, epochs=1))["epochs"]) == 1


def test_a_folder_whose_letters_cannot_be_printed(tmp_path):
    words = ["xvit_minimal.train", *TINY_WORDS, "--size", "16", "--epochs", "1", "--out", "\u8dd1"]
    for _ in range(2):  # trained, and found finished
        code, out, err = shell(*words, cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert code == 0 and "in \\u8dd1/record.json" in out, err


@pytest.mark.parametrize("more", [["--limit", "60", "--batch-size", "14"], ["--micro-batch", "4"]])
def test_two_processes_compute_what_one_does(tmp_path, more):
    """Same batches, gradients averaged, BatchNorm over both: same losses and weights, within
    rounding. In steps of 14, the last one of 4 pictures; and cut into micro-batches, whose
    statistics two processes of 4 pictures share, as one process has those of 8."""
    one = [*TINY_WORDS, *more]
    two = [*one, "--out", "two"]
    if "--micro-batch" in more:
        one[-1] = "8"
    code, out, err = shell("xvit_minimal.train", *one, "--out", "one", cwd=tmp_path)
    assert code == 0 and err == "" and out.count("epoch ") == 2  # no bar
    launch = "torch.distributed.run --standalone --nproc-per-node=2 -m xvit_minimal.train".split()
    code, out, err = shell(*launch, *two, cwd=tmp_path)
    assert code == 0 and out.count("epoch ") == 2, err  # no echo
    first, second = (
        json.loads((tmp_path / name / "record.json").read_text())["epochs"]
        for name in ("one", "two")
    )
    for a, b in zip(first, second):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)
    models = [
        train.load_model(tmp_path / name / "weights.safetensors")[0] for name in ("one", "two")
    ]
    for a, b in zip(*(model.state_dict().values() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    code, _, err = shell("xvit_minimal.train", *two, cwd=tmp_path)
    assert code == 1 and "2 processes there and 1 here" in err


def test_sets_too_small_for_the_processes_are_refused(tmp_path, monkeypatch):
    sets = {"train": data.shapes(12), "val": data.shapes(3), "test": data.shapes(4)}
    monkeypatch.setattr(train, "world", lambda: 4)
    with pytest.raises(ValueError, match="3 pictures in the val split for 4 processes"):
        train.check_parts(tiny(tmp_path), sets)
    monkeypatch.setattr(train, "world", lambda: 8)
    with pytest.raises(
        ValueError, match="steps of 12 pictures for 8 processes, expected at least 2"
    ):
        train.check_parts(tiny(tmp_path), sets)
    monkeypatch.setattr(train, "world", lambda: 3)
    train.check_parts(tiny(tmp_path), sets)


def test_a_run_says_after_its_first_steps_what_it_will_take(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "peak_memory", lambda device: 2.1e9)
    run = run_of(tmp_path, epochs=100)
    run.step = 4
    assert train.estimate(run, 630.0).startswith("the 396 steps that are left take about 2.9 days")
    assert train.estimate(run, 26.0).endswith("about 2.9 hours and 2.1 GB")
    train.train(tiny(tmp_path / "run"))
    assert capsys.readouterr().out.count("steps that are left take about") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux's malloc that gives pages back")
def test_kept_memory_is_not_cleared_again():
    """Fifty tensors of 40 MB, one after the other: 10,000 pages each unless they stay."""
    program = (
        "import resource, sys, torch\n"
        "from xvit_minimal.memory import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "for _ in range(50): torch.zeros(10**7)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
    )
    faults = {}
    for how in ("keep", "give back"):
        done = subprocess.run(
            [sys.executable, "-c", program, how], capture_output=True, text=True, check=True
        )
        faults[how] = int(done.stdout)
    if faults["give back"] < 10**5:
        pytest.skip("this malloc keeps memory by itself")
    assert faults["keep"] < faults["give back"] / 2


@pytest.mark.parametrize("float32_seconds, chosen", [(1.5, True), (1.0, False)])
def test_bfloat16_is_chosen_where_its_products_are_faster(monkeypatch, float32_seconds, chosen):
    seconds = {torch.bfloat16: 1.0, torch.float32: float32_seconds}
    monkeypatch.setattr(train, "_product_seconds", seconds.get)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert train._amp(torch.device("cpu")) is chosen


def test_bfloat16_is_not_timed_where_it_would_be_emulated(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr(train, "_product_seconds", lambda dtype: pytest.fail("timed"))
    assert not train._amp(torch.device("cpu"))
