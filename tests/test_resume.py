"""Runs that are interrupted, damaged, started twice, lengthened, or whose data have changed
(resume.py, record.py, train.py)."""

import dataclasses
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image
from test_train import few_to_score, shell, start, tiny  # noqa: F401 (a fixture for all)

from xvit_minimal import data, record, train
from xvit_minimal.optimization import learning_rate

KILLS = int(os.environ.get("XVIT_KILLS", "4"))  # at random moments
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="no such signals on Windows")


def weights(folder):
    return (folder / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train.train(tiny(folder))
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it, to do harm to."""
    return shutil.copytree(whole, tmp_path / "finished")


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def stop_at(step, monkeypatch, number):
    """Send this process a signal after a step."""
    train_step = train.Run.train_step

    def stopping(run, *args):
        whole = train_step(run, *args)
        if run.step == step:
            os.kill(os.getpid(), number)
        return whole

    monkeypatch.setattr(train.Run, "train_step", stopping)


def half_done(folder, monkeypatch, **changes):
    """The checkpoint of a run that was stopped after 6 of 12 steps."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(6, patch, signal.SIGINT)
        train.train(tiny(folder, **changes))
    return folder / "checkpoint.pt"


def timeless(folder):
    """A run's record without what the clock, the memory and the checkout say."""
    found = json.loads((folder / "record.json").read_text())
    for key in ("started", "wall_seconds", "peak_memory_bytes", "command", "commit"):
        del found[key]
    del found["config"]["out"], found["config"]["micro_batch"]
    for row in found["epochs"]:
        del row["seconds"]
    return found


def same_checkpoints(one, other):
    """Whether two checkpoints hold the same tensors, data and scores, bit for bit."""
    one, other = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other)
    )
    same = ("data", "results", "step", "loss")
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and all(one[key] == other[key] for key in same)


def tensors_in(value):
    """All tensors of a checkpoint's state: of the model, its average and the optimizer."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_in(part)]
    return []


# ------------------------------------------------------------------------------------------ killed

# A process that trains and kills itself with SIGKILL: before a given step, after so many seconds,
# or inside the write of a file: when half of it is on the disk, and between the two renames.
KILLED = """
import json, os, signal, sys, threading
from test_train import Classification, few
from xvit_minimal import record, recipe, run, train
Classification.load = staticmethod(few)
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
    run.Run.train_step = counted(run.Run.train_step)
elif how == "write":
    run.write = counted(run.write)
elif how == "rename":
    record.Path.replace = counted(record.Path.replace, "checkpoint.pt.part")
elif how == "seconds":
    threading.Timer(number, kill).start()
train.train(recipe.Config(**config))
"""


def killed(config, how, number):
    config = json.dumps(vars(config))
    words = [sys.executable, "-c", KILLED, how, str(number), config]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(words, capture_output=True, text=True, env=environment)


@needs_posix
def test_a_killed_run_ends_with_the_same_bytes(whole, tmp_path):
    """Killed before a step, half-way through writing a file and between its two renames."""
    config, draw = tiny(tmp_path), random.Random()
    blows = [("step", draw.randint(2, 4)), ("write", draw.randint(1, 3))]
    blows.append(("rename", draw.randint(1, 3)))
    for how, number in blows:
        assert killed(config, how, number).returncode == -signal.SIGKILL, blows
    train.train(config)
    assert weights(tmp_path) == weights(whole) and timeless(tmp_path) == timeless(whole), blows
    assert same_checkpoints(tmp_path, whole), blows


@needs_posix
def test_runs_killed_at_random_moments_end_with_the_same_bytes(whole, tmp_path):
    """XVIT_KILLS of them, at most four in a run before it may end."""
    config, draw, kills, runs = tiny(tmp_path / "run"), random.Random(), 0, 0
    begun = time.perf_counter()
    train.train(tiny(tmp_path / "timed"))
    seconds = time.perf_counter() - begun
    while kills < KILLS:
        moment = draw.uniform(0.0, 2 * seconds)
        ended = killed(config, "seconds", moment)
        kills += ended.returncode == -signal.SIGKILL
        if ended.returncode == 0 or kills % 4 == 0 or kills == KILLS:
            train.train(config)  # ends it if need be
            folder, runs = tmp_path / "run", runs + 1
            assert weights(folder) == weights(whole) and timeless(folder) == timeless(whole)
            assert same_checkpoints(folder, whole)
            shutil.rmtree(folder)
        else:
            assert ended.returncode == -signal.SIGKILL, ended.stderr
    print(f"{kills} kills in {runs} runs")


# ------------------------------------------------------------------------------------- interrupted


@needs_posix
@pytest.mark.parametrize(
    "step, number", [(6, signal.SIGINT), (8, signal.SIGTERM), (9, signal.SIGHUP)]
)
def test_a_signal_ends_after_the_step_and_the_same_command_goes_on(
    whole, tmp_path, monkeypatch, step, number
):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(step, patch, number)
        train.train(tiny(tmp_path, save_steps=100))
    assert signal.getsignal(number) == handler
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step
    with pytest.raises(
        ValueError, match="save-steps is 100 there and 1 here.*choose another --out"
    ):
        train.train(tiny(tmp_path))
    train.train(tiny(tmp_path, save_steps=100))
    assert tensors(tmp_path) == tensors(whole)  # the bytes before them hold save_steps as well


def tensors(folder):
    content = weights(folder)
    return content[8 + int.from_bytes(content[:8], "little") :]


@needs_posix
def test_ctrl_c_acts_within_a_step_which_is_then_not_applied(tmp_path, monkeypatch):
    """Of 8 micro-batches the second is the last; the checkpoint is that of the step before."""
    changes = dict(micro_batch=2, drop_path=0.0)
    train.train(tiny(tmp_path / "whole", **changes))
    seen, loss = [], train.TASKS["classification"].loss

    def pressed(task, net, batch):
        seen.append(len(batch[0]))
        if len(seen) == 3 * 8 + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(task, net, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.TASKS["classification"], "loss", pressed)
        train.train(tiny(tmp_path / "cut", **changes))
    assert seen == [2] * (3 * 8 + 2)
    assert torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)["step"] == 3
    train.train(tiny(tmp_path / "cut", **changes))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_data_are_loaded_names_no_checkpoint(tmp_path, monkeypatch, capsys, number):
    def load(config, split, limit):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(train.TASKS["classification"], "load", staticmethod(load))
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path / "run")])
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == "\nstopped; no step was made yet, so the same command starts anew"
    assert signal.getsignal(number) == handler and not list((tmp_path / "run").iterdir())


@needs_posix
def test_a_signal_while_an_epoch_is_scored_keeps_the_epoch(whole, tmp_path, monkeypatch):
    """It need not wait for the scores, which are taken when the run goes on."""

    def evaluate(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.TASKS["classification"], "evaluate", staticmethod(evaluate))
        train.train(tiny(tmp_path))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 12 and len(state["history"]) == 2
    train.train(tiny(tmp_path))
    assert weights(tmp_path) == weights(whole) and timeless(tmp_path) == timeless(whole)


@needs_posix
def test_what_nohup_ignores_stays_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(6, monkeypatch, signal.SIGHUP)
        assert len(train.train(tiny(tmp_path))["epochs"]) == 3
    finally:
        signal.signal(signal.SIGHUP, handler)


WORDS = (
    "xvit_minimal.train --limit 64 --batch-size 16 --epochs 40 --dim 8 --depth 1 --num-heads 2 "
    "--device cpu --eval-epochs 40 --out run"
).split()


@needs_posix
def test_a_closed_pipe_ends_with_one_line_and_the_state_is_kept(tmp_path):
    process = start(*WORDS, cwd=tmp_path)
    while "epoch 1/40" not in process.stdout.readline():
        pass
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1 and err.count("\n") == 1
    assert "nobody reads what this program prints" in err and "checkpoint.pt" in err
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] >= 4


# ------------------------------------------------------------------------------------------ locked


@needs_posix
def test_of_three_starts_at_once_one_runs_and_the_others_say_so(tmp_path):
    words = [*WORDS, "--epochs", "6"]
    processes = [start(*words, cwd=tmp_path) for _ in range(3)]
    ended = [(*process.communicate(timeout=180), process.returncode) for process in processes]
    losers = [err for _, err, code in ended if code]
    assert sum(code == 0 for *_, code in ended) >= 1, ended
    for err in losers:
        assert err.count("\n") == 1 and "error: another run is using run" in err, err
    for out, _, code in ended:  # a start that comes late finds a run that has ended
        assert code or "epoch 6/6" in out or "going on after step 24" in out
    again = shell(*words, cwd=tmp_path)
    assert again[0] == 0 and not (tmp_path / "run/run.lock").exists()


def test_a_folder_has_one_user_at_a_time_and_no_lock_is_left(tmp_path):
    with record.lock(tmp_path):
        with pytest.raises(ValueError, match="another run is using .*choose another --out"):
            with record.lock(tmp_path):
                pass
    with record.lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@needs_posix
def test_a_file_or_a_link_to_nowhere_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match=f"{name} is no folder.*choose another --out"):
            with record.lock(tmp_path / name):
                pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    with record.lock(tmp_path / "linked"):
        assert (tmp_path / "folder/run.lock").exists()


def test_a_lock_file_that_a_killed_run_left_keeps_nobody_out(finished):
    (finished / "run.lock").touch()
    train.train(tiny(finished))
    assert not (finished / "run.lock").exists()


def test_a_lock_is_never_held_twice(tmp_path):
    """Eight threads that take it again and again, while its file comes and goes."""
    holders, most, taken = [], [], []

    def take():
        for _ in range(50):
            try:
                with record.lock(tmp_path):
                    holders.append(1)
                    most.append(len(holders))
                    time.sleep(0.0005)
                    holders.pop()
                    taken.append(1)
            except ValueError:
                pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(taken) > 10


# ----------------------------------------------------------------------------------------- damaged


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert train.train(tiny(finished))["epochs"][-1]["epoch"] == 3
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    out = capsys.readouterr().out
    assert "going on after step 12" in out and "made again" not in out


@pytest.mark.parametrize("name", ["weights.safetensors", "record.json"])
@pytest.mark.parametrize("how", ["lost", "cut", "empty", "changed"])
def test_lost_results_of_a_finished_run_are_made_again(finished, capsys, name, how):
    path, good = finished / name, (finished / name).read_bytes()
    if how == "lost":
        path.unlink()
    elif how == "changed":
        path.write_bytes(good[:-50] + bytes([good[-50] ^ 1]) + good[-49:])
    else:
        path.write_bytes(good[: len(good) // 2] if how == "cut" else b"")
    train.train(tiny(finished))
    assert path.read_bytes() == good
    assert f"{name} was not as this run had left it: made again" in capsys.readouterr().out


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", ["truncated", "empty", "foreign", "hostile", "pickle", "flipped"])
def test_a_checkpoint_that_is_none_is_refused_and_the_one_before_it_used(
    whole, tmp_path, monkeypatch, capsys, what
):
    path = half_done(tmp_path, monkeypatch)
    content = path.read_bytes()
    if what == "foreign":
        torch.save({"model": {}}, path)
    elif what == "hostile":
        state = torch.load(path, weights_only=True)
        hostile = {**state, "history": Hostile(tmp_path / "taken")}
        path.write_bytes(record.checkpoint_bytes(hostile))
    elif what == "pickle":
        path.write_bytes(pickle.dumps(Hostile(tmp_path / "taken")))
    elif what == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: 20_000 if what == "truncated" else 0])
    train.train(tiny(tmp_path))
    out = capsys.readouterr().out
    assert "refused" in out and "checkpoint.pt" in out and "going on after step 5" in out
    assert weights(tmp_path) == weights(whole) and not (tmp_path / "taken").exists()
    assert (tmp_path / "checkpoint.refused.pt").exists()


def test_a_flipped_bit_is_noticed(whole, tmp_path):
    """Anywhere in the file: in a tensor, in the pickle, in the names and sizes of the archive."""
    content, draw = (whole / "checkpoint.pt").read_bytes(), random.Random(0)
    for _ in range(300):
        place = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        (tmp_path / "checkpoint.pt").write_bytes(flipped)
        with pytest.raises(ValueError, match="refused .*checkpoint.pt"):
            record.read_checkpoint(tmp_path / "checkpoint.pt", train.Run.KEYS)


def test_with_no_checkpoint_left_to_use_nothing_is_overwritten(tmp_path, monkeypatch):
    path = half_done(tmp_path, monkeypatch)
    for name in (path, path.with_name("checkpoint.previous.pt")):
        name.write_bytes(b"broken")
    with pytest.raises(ValueError, match="move it away to start anew"):
        train.train(tiny(tmp_path))
    assert path.read_bytes() == b"broken"


def test_a_checkpoint_of_another_version_is_called_that(finished):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        state = torch.load(finished / name, weights_only=True)
        del state["segments"]
        torch.save({**state, "schedule": {}}, finished / name)
    with pytest.raises(ValueError, match="written by another version of this package.*--out"):
        train.train(tiny(finished))


def test_a_run_whose_options_this_version_does_not_have_is_called_that(finished):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        state = torch.load(finished / name, weights_only=True)
        state["wanted"]["dropout"] = 0.1
        (finished / name).write_bytes(record.checkpoint_bytes(state))
    with pytest.raises(ValueError, match="another version of this package: go on with that"):
        train.train(tiny(finished))


def test_a_full_disk_keeps_the_last_good_checkpoint(whole, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def sixth(file):
        calls.append(0)
        return full_disk() if len(calls) == 6 else fsync(file)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="No space.*weights.safetensors"),
    ):
        patch.setattr(os, "fsync", sixth)
        train.train(tiny(tmp_path))
    assert not list(tmp_path.glob("*.part"))
    train.train(tiny(tmp_path))
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    path = tmp_path / "new" / "file"
    record.write(path, b"old")

    def fail(*_):
        raise error("no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error):
        record.write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_file_of_init_is_not_needed_once_a_checkpoint_is_there(
    whole, tmp_path, monkeypatch, capsys
):
    """Gone, and with only the previous checkpoint left; a first start without it is an error."""
    body = tmp_path / "body.safetensors"
    shutil.copy(whole / "weights.safetensors", body)
    path = half_done(tmp_path / "run", monkeypatch, init=str(body))
    body.unlink()
    path.unlink()
    found = train.train(tiny(tmp_path / "run", init=str(body)))
    assert found["epochs"][-1]["epoch"] == 3 and "after step 5" in capsys.readouterr().out
    with pytest.raises(OSError, match="body.safetensors"):
        train.train(tiny(tmp_path / "anew", init=str(body)))


def test_another_file_of_init_is_another_run(whole, tmp_path, monkeypatch):
    body = tmp_path / "body.safetensors"
    shutil.copy(whole / "weights.safetensors", body)
    half_done(tmp_path / "run", monkeypatch, init=str(body))
    train.train(tiny(tmp_path / "other", seed=1))
    shutil.copy(tmp_path / "other/weights.safetensors", body)
    with pytest.raises(ValueError, match="other data: init: other content"):
        train.train(tiny(tmp_path / "run", init=str(body)))


def test_files_that_were_moved_are_the_same_data(whole, photos, tmp_path, monkeypatch):
    body = tmp_path / "body.safetensors"
    shutil.copy(whole / "weights.safetensors", body)
    config = dataclasses.replace(own(tmp_path / "run", photos), init=str(body))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(6, patch, signal.SIGINT)
        train.train(config)
    moved = {"data": photos.rename(tmp_path / "elsewhere"), "init": body.rename(tmp_path / "b")}
    found = train.train(dataclasses.replace(config, **moved))
    assert [row["epoch"] for row in found["epochs"]] == [1, 2, 3] and "elsewhere" in found[
        "command"
    ]
    assert train.train(dataclasses.replace(config, **moved)) == found
    with pytest.raises(ValueError, match="--init is .*there and None here"):
        train.train(dataclasses.replace(config, data=moved["data"], init=None))


# -------------------------------------------------------------------------------------- other data


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 training and 12 test pictures in two classes."""
    images = data.shapes(52, size=16)
    for n, image in enumerate(images.images):
        part, kind = "train" if n < 40 else "test", ("cat", "dog")[n % 2]
        place = tmp_path / "photos" / part / kind
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{n:02}.png")
    return tmp_path / "photos"


def own(folder, at):
    changes = dict(size=16, limit=None, batch_size=8, stem_stride=4)
    return dataclasses.replace(tiny(folder), data=str(at), **changes)


CHANGES = {  # what happens to the folder, and what the run says of it
    "added": (
        lambda at: shutil.copy(at / "train/cat/00.png", at / "train/cat/new.png"),
        "train: pictures 36 there and 37 here",
    ),
    "removed": (lambda at: (at / "train/cat/02.png").unlink(), "pictures"),
    "renamed class": (
        lambda at: [(at / part / "cat").rename(at / part / "eel") for part in ("train", "test")],
        r"classes \['cat', 'dog'\] there and \['dog', 'eel'\] here",
    ),
    "added class": (
        lambda at: [
            shutil.copytree(at / part / "cat", at / part / "ape") for part in ("train", "test")
        ],
        r"classes \['cat', 'dog'\] there and \['ape', 'cat', 'dog'\] here",
    ),
    "replaced": (
        lambda at: shutil.copy(at / "train/dog/01.png", at / "train/cat/00.png"),
        "other content",
    ),
    "swapped": (
        lambda at: [
            (at / "train/cat/00.png").rename(at / "train/dog/00.png"),
            (at / "train/dog/01.png").rename(at / "train/cat/01.png"),
        ],
        "other content",
    ),
    "test replaced": (
        lambda at: shutil.copy(at / "train/dog/01.png", at / "test/cat/40.png"),
        "test: other content",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("done", [False, True])
def test_a_run_does_not_go_on_with_other_data(photos, tmp_path, monkeypatch, what, done):
    at = photos
    config = own(tmp_path / "run", at)
    if done:
        train.train(config)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(6, patch, signal.SIGINT)
            train.train(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    change, message = CHANGES[what]
    change(at)
    with pytest.raises(ValueError, match=f"holds another run .*other data: .*{message}.*--out"):
        train.train(config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_the_same_data_elsewhere_are_the_same_data(photos, tmp_path, monkeypatch):
    """A folder that was moved is another --data, but touched files and a new date are not."""
    at = photos
    config = own(tmp_path / "run", at)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(6, patch, signal.SIGINT)
        train.train(config)
    for path in at.rglob("*.png"):
        os.utime(path, (0, 0))
    assert train.train(config)["epochs"][-1]["epoch"] == 3


# ------------------------------------------------------------------------------------- more epochs


def test_more_epochs_go_on_at_the_rate_of_the_longer_run(finished, capsys):
    before = json.loads((finished / "record.json").read_text())
    found = train.train(tiny(finished, epochs=5))
    config = tiny(finished, epochs=5)
    assert [row["epoch"] for row in found["epochs"]] == [1, 2, 3, 4, 5]
    assert found["epochs"][:3] == before["epochs"]
    assert found["epochs"][3]["lr"] == learning_rate(16, config, 4) > before["epochs"][2]["lr"]
    assert found["epochs"][4]["lr"] == config.final_lr
    first = {"step": 0, "epochs": 3, "results": before["results"][0]}
    assert found["segments"] == [first, {"step": 12, "epochs": 5}]
    assert found["results"][0]["epoch"] == 5 and found["config"]["epochs"] == 5
    old, new = (learning_rate(12, tiny(finished, epochs=n), 4) for n in (3, 5))
    words = f"learning rate is that of the longer run, {new:.3g} instead of {old:.3g}"
    assert words in capsys.readouterr().out
    with pytest.raises(ValueError, match="--epochs is 5 there and 3 here, which is less"):
        train.train(tiny(finished))


def test_a_lengthened_run_that_is_stopped_ends_like_one_that_is_not(finished, whole, tmp_path):
    straight = shutil.copytree(whole, tmp_path / "straight")
    train.train(tiny(straight, epochs=5))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(14, patch, signal.SIGINT)
        train.train(tiny(finished, epochs=5))
    train.train(tiny(finished, epochs=5))
    assert weights(finished) == weights(straight) and timeless(finished) == timeless(straight)


def test_what_was_chosen_for_the_shorter_run_stays(tmp_path, monkeypatch):
    """The decay of the average follows the number of steps, but not that of a run already begun."""
    changes = dict(ema=None, lr=None, warmup=None, batch_size=None)
    first = train.train(tiny(tmp_path, **changes))["config"]
    then = train.train(tiny(tmp_path, epochs=6, **changes))["config"]
    assert first["ema"] is not None and {**first, "epochs": 6} == then
