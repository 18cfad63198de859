"""The runner of experiments: what is missing is run and recorded, and nothing gets lost."""

import json
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import campaign
import pytest
from experiments import ARCHIVE, EXPERIMENTS, Experiment

from xvit_minimal.recipe import recipe

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(data="shapes", model="xvit_pico", dim=16, depth=1, limit=40, size=16, epochs=2)
FIRST = Experiment("some/first", "does it run?", SMALL, minutes=1, priority=2, seeds=(0, 1))


def git(root, *words):
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", root, *name, *words], check=True, capture_output=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The runner in a repository of its own that holds the package, committed."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "xvit_minimal", root / "xvit_minimal", ignore=lambda *_: ["__pycache__"])
    (root / "data").mkdir()
    (root / ".gitignore").write_text(".campaign/\n__pycache__/\nruns/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    monkeypatch.setattr(campaign, "ROOT", root)
    monkeypatch.setattr(campaign, "RECORDS", root / "book/runs/train")
    monkeypatch.setattr(campaign, "CAMPAIGN", root / ".campaign")
    monkeypatch.delenv("XVIT_DATA", raising=False)
    return root


@pytest.fixture
def declare(monkeypatch):
    def change(*experiments):
        monkeypatch.setattr(campaign, "EXPERIMENTS", experiments)
        monkeypatch.setattr(sys.modules["experiments"], "EXPERIMENTS", experiments)

    return change


def states():
    return {job.name: job.state for job in campaign.jobs()}


def work(minutes=5):
    return campaign.work("cpu", workers=2, threads=1, minutes=minutes)


def test_what_is_missing_is_run_and_recorded(place, declare):
    declare(FIRST)
    assert states() == {"some/first-0": "missing", "some/first-1": "missing"}
    with open(place / "xvit_minimal/train.py", "a") as file:
        file.write("raise SystemExit('edited while the runs go on')")
    assert work() == 0
    assert set(states().values()) == {"done"}
    found = [json.loads(path.read_text()) for path in (place / "book/runs/train/some").iterdir()]
    assert {each["seed"] for each in found} == {0, 1}
    assert all(len(each["commit"]) == 40 for each in found)
    assert all(str(place) not in json.dumps(each) for each in found)
    times = [path.stat().st_mtime_ns for path in (place / "book/runs/train/some").iterdir()]
    assert work() == 0  # nothing is left to do
    assert times == [path.stat().st_mtime_ns for path in (place / "book/runs/train/some").iterdir()]


def test_a_run_that_was_killed_goes_on_with_the_code_that_it_began_with(place, declare):
    long = Experiment("long", "?", {**SMALL, "epochs": 30, "eval_epochs": 30}, 1, 1, seeds=(0,))
    declare(long)
    (job,) = campaign.jobs()
    process, folder = campaign.start(job, "cpu", 1)
    while not (folder / "checkpoint.previous.pt").exists():
        assert process.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.05)
    process.kill()
    process.wait()
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # as if it were killed between two renames
    first = subprocess.check_output(["git", "-C", place, "rev-parse", "HEAD"], text=True).strip()
    (place / "later.txt").write_text("another commit")
    git(place, "add", ".")
    git(place, "commit", "--quiet", "--message", "later")
    assert job.state == "running" and "epoch" in campaign.progress(job)
    assert work() == 0 and job.state == "done"
    found = json.loads((place / "book/runs/train/long-0.json").read_text())
    assert found["commit"] == first and len(found["epochs"]) == 30


def test_when_the_time_is_up_runs_end_with_a_checkpoint(place, declare):
    declare(
        Experiment("long", "?", {**SMALL, "epochs": 5000, "eval_epochs": 5000}, 1, 1, seeds=(0,))
    )
    clock = time.monotonic()
    assert work(minutes=0.25) == 0
    assert time.monotonic() - clock < 60
    (job,) = campaign.jobs()
    assert job.state == "running" and (job.folder() / "checkpoint.pt").exists()


def test_the_rate_is_that_of_the_best_tuning_run(place, declare):
    rates = [
        Experiment(f"tune/some-{lr}", "?", {**SMALL, "lr": lr}, 1, priority=1, seeds=(0,))
        for lr in (1e-3, 4e-3)
    ]
    tuned = Experiment("some/tuned", "?", SMALL, 1, priority=3, seeds=(0,), rate_from="tune/some")
    other = Experiment("tune/some-other-0.001", "?", {**SMALL, "lr": 1e-3}, 1, 1, seeds=(0,))
    declare(tuned, *rates, other)  # whose runs are missing to the end: they are no rates of it
    assert states()["some/tuned-0"] == "waits for tune/some"
    for experiment, score in zip(rates, (0.75, 0.5)):
        path = place / f"book/runs/train/{experiment.name}-0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"epochs": [{"val_top1": 0.9}, {"val_top1": score}]}))
    (job,) = [job for job in campaign.jobs() if job.name == "some/tuned-0"]
    assert job.config.lr == 1e-3 and job.state == "missing"


def test_a_record_that_does_not_fit_its_declaration_is_stale(place, declare):
    declare(Experiment("one", "?", SMALL, 1, 1, seeds=(0,)))
    assert work() == 0 and states() == {"one-0": "done"}
    declare(Experiment("one", "?", {**SMALL, "epochs": 3}, 1, 1, seeds=(0,)))
    assert states() == {"one-0": "stale: epochs is 2 there and 3 in its declaration"}
    declare(Experiment("one", "?", SMALL, 1, 1, seeds=(0,)))
    path = place / "book/runs/train/one-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": 1}))
    assert states()["one-0"].startswith("stale: version 1 of the training code")


def test_a_run_that_fails_says_why_and_the_others_go_on(place, declare, capsys):
    wrong = Experiment("wrong", "?", {**SMALL, "data": "nowhere/at/all"}, 1, 1, seeds=(0,))
    declare(wrong, Experiment("right", "?", SMALL, 1, 2, seeds=(0,)))
    assert work() == 1
    assert states() == {"wrong-0": "missing", "right-0": "done"}
    assert "wrong-0: ended with 1" in (said := capsys.readouterr().out) and "nowhere" in said


def test_a_run_of_two_threads_waits_for_both_and_has_them_alone(place, declare, monkeypatch):
    declare(
        Experiment("before", "?", SMALL, 1, 1, seeds=(0,)),
        Experiment("wide", "?", SMALL, 1, 2, seeds=(0,), threads=2),
        Experiment("after", "?", SMALL, 1, 3, seeds=(0, 1)),
    )
    begun, now, most = [], set(), []
    start, finish = campaign.start, campaign.finish

    def started(job, device, threads):
        begun.append((job.name, threads))
        now.add(job.name)
        most.append(set(now))
        return start(job, device, threads)

    def finished(job, *rest):
        now.discard(job.name)
        finish(job, *rest)

    monkeypatch.setattr(campaign, "start", started)
    monkeypatch.setattr(campaign, "finish", finished)
    assert work() == 0
    assert begun == [("before-0", 1), ("wide-0", 2), ("after-0", 1), ("after-1", 1)]
    assert most[1] == {"wide-0"} and most[3] == {"after-0", "after-1"}


def test_the_list_says_what_is_left(place, declare):
    declare(FIRST, Experiment("big", "?", SMALL, 100, 1, seeds=(0,), needs="gpu"))
    text = campaign.table("cpu")
    assert "some/first-0" in text and "missing" in text and "big" not in text
    assert text.endswith("0 of 2 runs recorded; the others take 2 thread-minutes")
    assert [job.name for job in campaign.jobs("cuda")] == ["big-0"]


def test_a_worktree_whose_making_was_cut_short_is_made_again(place, declare):
    tree = campaign.worktree()
    shutil.rmtree(tree / "xvit_minimal")
    declare(FIRST)
    assert "missing" in campaign.table("cpu")
    assert campaign.worktree() == tree and (tree / "xvit_minimal/record.py").exists()


def test_what_cannot_be_recorded_is_not_begun(place, declare, capsys):
    declare(FIRST)
    shutil.rmtree(place / ".git")
    with pytest.raises(SystemExit, match="error: .*a record names one: clone the repository"):
        campaign.main([])
    for wrong in (["--workers", "0"], ["--minutes", "nan"], ["--minutes", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            campaign.main(wrong)
    assert "got --workers below 1 or --minutes below 0" in capsys.readouterr().err


def test_declarations_are_valid_and_cover_every_record():
    names = [experiment.name for experiment in EXPERIMENTS]
    assert len(set(names)) == len(names)
    for experiment in EXPERIMENTS:
        recipe(**experiment.options)  # raises ValueError for what is out of range
        assert experiment.needs in ("cpu", "gpu") and experiment.question
        if experiment.rate_from:
            assert any(name.startswith(f"{experiment.rate_from}-") for name in names)
    declared = {
        f"{experiment.name}-{seed}" for experiment in EXPERIMENTS for seed in experiment.seeds
    }
    records = ROOT / "book/runs/train"
    for path in records.rglob("*.json"):
        name = path.relative_to(records).with_suffix("").as_posix()
        assert name in declared or any(fnmatch(name, pattern) for pattern in ARCHIVE), name
