"""Work through the runs that book/experiments.py declares and book/runs/ does not hold yet.

    make runs                                    on a CPU, two at a time, until nothing is missing
    make runs LIST=1                             what is done, running, missing, stale; time left
    make runs DEVICE=cuda WORKERS=8 MINUTES=9    those for a GPU, which eight of them share

A run takes place in a worktree of the last commit, .campaign/COMMIT/, so that whoever edits
meanwhile disturbs nothing, and its record names that commit. It may be stopped at any time, by
Ctrl-C or by force: the next `make runs` goes on from its checkpoint, with the code that it began
with. When it ends, its record is checked against its declaration and put into book/runs/train/.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from xvit_minimal import record
from xvit_minimal.command_line import command
from xvit_minimal.recipe import recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book"))
from experiments import EXPERIMENTS  # noqa: E402

RECORDS = ROOT / "book/runs/train"
CAMPAIGN = ROOT / ".campaign"


@dataclass
class Job:
    """One run: an experiment with a seed."""

    experiment: object
    seed: int

    @property
    def name(self):
        return f"{self.experiment.name}-{self.seed}"

    @property
    def config(self):
        """Its Config, or None while the runs that it takes its learning rate from are missing."""
        options = self.experiment.settled(RECORDS)
        if options is None:
            return None
        return recipe(**options, seed=self.seed, out=f"runs/{self.name}")

    @property
    def state(self):
        """ "done", "stale: WHY", "waits for NAME", "running" or "missing"."""
        config, path = self.config, RECORDS / f"{self.name}.json"
        if config is None:
            return f"waits for {self.experiment.rate_from}"
        if path.exists():
            misfit = differs(json.loads(path.read_text()), config)
            return f"stale: {misfit}" if misfit else "done"
        return "running" if self.folder() else "missing"

    def folder(self):
        """The folder of a run of this name that has begun, with code of today's version."""
        for tree in sorted(CAMPAIGN.glob("*/"), key=os.path.getmtime, reverse=True):
            if not (tree / "xvit_minimal/record.py").exists():
                continue  # its making was cut short
            code = re.search(r"^CODE = (\d+)", (tree / "xvit_minimal/record.py").read_text(), re.M)
            begun = tree / f"runs/{self.name}"
            saved = [*begun.glob("checkpoint.pt"), *begun.glob("checkpoint.previous.pt")]
            if code and int(code[1]) == record.CODE and saved:
                return begun
        return None


def differs(found, config):
    """In what a record is not that of a Config run with the code of today, or None if it fits."""
    if (code := found.get("code", 1)) != record.CODE:
        return f"version {code} of the training code made it, {record.CODE} is today's"
    for option in fields(config):  # one that is newer than the record had its default there
        name, value = option.name, getattr(config, option.name)
        there = found["config"].get(name, option.default)
        if name not in ("out", "device") and value is not None and there != value:
            return f"{name} is {there!r} there and {value!r} in its declaration"
    return None


def jobs(device="cpu"):
    """All runs for a device, by priority: what is compared was computed on one kind."""
    fit = [e for e in EXPERIMENTS if e.needs == ("cpu" if device == "cpu" else "gpu")]
    return [Job(e, seed) for e in sorted(fit, key=lambda e: e.priority) for seed in e.seeds]


def worktree():
    """A clean worktree of the last commit. Raises ValueError outside a git checkout."""
    try:
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{ROOT}: git finds no commit here ({getattr(error, 'stderr', error)!r:.150}), and a "
            "record names one: clone the repository"
        ) from error
    tree = CAMPAIGN / commit[:12]
    if not (tree / "xvit_minimal/record.py").exists():
        shutil.rmtree(tree, ignore_errors=True)  # its making was cut short
        git("worktree", "prune")
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    return tree


def git(*words):
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def start(job, device, threads):
    """Begin a run, or go on with it, as a process of its own; returns (process, folder)."""
    begun = job.folder()
    tree = begun.parents[len(Path(job.name).parts)] if begun else worktree()
    folder = tree / f"runs/{job.name}"
    folder.mkdir(parents=True, exist_ok=True)
    words = shlex.split(command(job.config))[1:]  # without "python"
    environment = {
        **os.environ,
        "XVIT_DATA": os.environ.get("XVIT_DATA", str(ROOT / "data")),
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that spins while it waits takes another's core
    }
    if threads > 1:  # a run's own threads wait for each other all the time: a step takes 0.6 of it
        environment["GOMP_SPINCOUNT"] = "50000"
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, *words, "--device", device],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this program alone, which then stops its runs
        )
    return process, folder


def land(job, folder):
    """Put the record of a run that ended into book/runs/train/, or raise ValueError."""
    found = json.loads((folder / "record.json").read_text())
    if misfit := differs(found, job.config):
        raise ValueError(f"{job.name}: its record does not fit its declaration: {misfit}")
    if not re.fullmatch(r"[0-9a-f]{40}", str(found["commit"])):
        raise ValueError(
            f"{job.name}: commit {found['commit']!r}, expected the hash of a clean one"
        )
    record.write(RECORDS / f"{job.name}.json", (folder / "record.json").read_bytes())


def work(device, workers, threads, minutes):
    """Run what is missing until nothing is, or the time is up; returns the number of failures."""
    until = time.monotonic() + 60 * minutes
    running, failed = {}, set()
    try:
        while True:
            for process in [p for p in running if p.poll() is not None]:
                job, folder = running.pop(process)
                finish(job, folder, process.returncode, failed)
            taken = {job.name for job, _ in running.values()} | failed
            waiting = [j for j in jobs(device) if j.name not in taken and is_open(j.state)]
            if time.monotonic() > until or not (waiting or running):
                break
            free = workers - sum(width(job, workers) for job, _ in running.values())
            if waiting and width(waiting[0], workers) <= free:
                process, folder = start(waiting[0], device, threads * width(waiting[0], workers))
                running[process] = waiting[0], folder
                print(f"{waiting[0].name}: running in {folder}", flush=True)
            else:
                time.sleep(1)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)  # it ends the step and writes a checkpoint
        for process, (job, folder) in running.items():
            if process.wait() == 0:  # it had just ended
                finish(job, folder, 0, failed)
    return len(failed)


def width(job, workers):
    """How many of the workers' places a run takes: one for each of its threads, if there are."""
    return min(job.experiment.threads, workers)


def is_open(state):
    return state in ("missing", "running") or state.startswith("stale")


def finish(job, folder, code, failed):
    """Land a run that ended well; say why another did not."""
    try:
        if code:
            last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"{job.name}: ended with {code}: {' '.join(last)}")
        land(job, folder)
        print(f"{job.name}: recorded", flush=True)
    except (OSError, ValueError) as error:
        failed.add(job.name)
        print(error, flush=True)


def progress(job):
    """Epochs done and all epochs of a run that has begun, as text."""
    path = job.folder() / "record.json"
    done = len(json.loads(path.read_text())["epochs"]) if path.exists() else 0
    return f"epoch {done} of {job.config.epochs}"


def table(device):
    """Every run with its state, then how long the rest takes."""
    lines, left = [], 0.0
    for job in jobs(device):
        state = job.state
        if state != "done":
            left += job.experiment.minutes
        if state == "running":
            state += f", {progress(job)}"
        lines.append(f"{job.experiment.minutes:6.0f} min  {job.name:40} {state}")
    done = sum(line.endswith(" done") for line in lines)
    lines.append(
        f"{done} of {len(lines)} runs recorded; the others take {left:,.0f} thread-minutes"
    )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say what is done, and run nothing")
    parser.add_argument("--device", default="cpu", help="cpu [default] or cuda")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time [2]")
    options = parser.parse_args(argv)
    if options.list:
        return print(table(options.device))
    if options.workers < 1 or not options.minutes >= 0:
        parser.error("got --workers below 1 or --minutes below 0, expected some of each")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` stops the runs
    try:
        failures = work(options.device, options.workers, 1, options.minutes)
    except KeyboardInterrupt:
        sys.exit("stopped; make runs goes on")
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(f"{failures} runs failed: their folders hold log.txt" if failures else 0)


if __name__ == "__main__":
    main()
