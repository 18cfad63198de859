"""The records of runs in book/runs: what each has to say, and nothing of one machine."""

import json
import math
import re
from datetime import datetime

import pytest
from conftest import MACHINE_PATH, RECORD


def finite(value):
    """Whether a number, or every number inside lists and objects, is finite."""
    if isinstance(value, (dict, list)):
        return all(finite(v) for v in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def number(value):
    return type(value) in (int, float) and finite(value)


def iso(text):
    try:
        return bool(datetime.fromisoformat(text.replace("Z", "+00:00")))
    except (AttributeError, ValueError):
        return False


def has(fields, maybe_null=()):
    return lambda value: (
        isinstance(value, dict)
        and all(value.get(key) is not None for key in fields.split())
        and all(key in value for key in maybe_null)
    )


def objects(value):
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


EVERY_RUN = {  # key: (what it has to be, in words)
    "kind": (lambda v: v in ("bench", "train", "evaluate"), '"bench", "train" or "evaluate"'),
    "command": (
        lambda v: isinstance(v, str) and v.split(" ")[0] in ("python", "make"),
        "a command of python or make",
    ),
    "config": (lambda v: isinstance(v, dict), "an object"),
    "seed": (lambda v: type(v) is int, "an integer"),
    "commit": (
        lambda v: bool(re.fullmatch(r"[0-9a-f]{7,40}", str(v))),
        "a commit's hash: commit, then run again",
    ),
    "versions": (has("python torch"), "an object with python and torch"),
    "hardware": (
        has("cpu cores", ("gpu", "driver")),
        "an object with cpu, cores, gpu, driver (or null, null)",
    ),
    "started": (iso, "a date and time in ISO 8601"),
    "wall_seconds": (lambda v: number(v) and v > 0, "a positive number"),
    "results": (
        lambda v: objects(v) and all(any(map(number, r.values())) for r in v),
        "a list of objects with numbers",
    ),
}
TRAINING = {
    "data": (has("name copy splits"), "an object with name, copy and splits"),
    "epochs": (objects, "a list of objects, one an epoch"),
    **dict.fromkeys(
        ("parameters", "multiply_adds", "peak_memory_bytes"), EVERY_RUN["wall_seconds"]
    ),
}
# of the training code; fitted to the rows of a bench; of a run that was lengthened
OPTIONAL = {"code", "slopes", "segments"}


def problems_in_scores(record):
    """The test pictures are looked at once, when a run ends; its epochs are scored on others.

    Older runs looked at the test pictures in every epoch: their last epoch has the run's result.
    """
    results, epochs = record["results"], record["epochs"]
    test = {key: value for key, value in results[0].items() if key.startswith("test_")}
    if len(results) > 1 or not any(map(number, test.values())):
        yield "results are not one object with test_...: record the run's end alone"
    scored = [row for row in epochs if any(key.startswith("test_") for key in row)]
    if scored and any(key.startswith("val_") for row in epochs for key in row):
        yield "epochs have val_... and test_...: score them on one of the two"
    elif scored and {key: scored[-1].get(key) for key in test} != test:
        yield "the last epoch's test_... are not the run's: record them as they were"


def problems_in_records(root):
    problems = []
    for path in sorted((root / "book/runs").rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        try:
            record = json.loads(text)
        except ValueError as error:
            record = error
        if not isinstance(record, dict):
            problems.append(f"{path.name}: no JSON object ({record!r:.60}): record the run again")
            continue
        wanted = {**EVERY_RUN, **(TRAINING if record.get("kind") == "train" else {})}
        problems += [
            f"{path.name}: {key} is {record.get(key)!r:.60}, expected {words}"
            for key, (fits, words) in wanted.items()
            if not fits(record.get(key))
        ]
        if record.get("kind") == "train" and objects(record.get("results")):
            if objects(record.get("epochs")):
                problems += [f"{path.name}: {fault}" for fault in problems_in_scores(record)]
        problems += [
            f"{path.name}: unknown key {key}: take it out or add it to tests/test_records.py"
            for key in record
            if key not in {*wanted, *OPTIONAL}
        ]
        if not finite(record):
            problems.append(
                f"{path.name}: a number is not finite: record null, and why, or mend the run"
            )
        if found := MACHINE_PATH.search(text):
            problems.append(
                f"{path.name}: names a place on one machine ({found[0]}...): take it out"
            )
    return problems


@pytest.mark.parametrize(
    "key, value",
    [
        *[(key, None) for key in {**EVERY_RUN, **TRAINING}],
        ("command", ""),
        ("command", "rm -rf"),
        ("seed", True),
        ("commit", "0123abcd-dirty"),
        ("hardware", {"cpu": "some", "cores": 2}),
        ("versions", {"python": "3.12"}),
        ("hardware", {"cpu": None, "cores": 2, "gpu": None, "driver": None}),
        ("started", "now"),
        ("wall_seconds", -1),
        ("results", []),
        ("results", [{"accuracy": "high"}]),
        ("results", [{"epoch": 1, "val_top1": 0.5}]),
        ("results", [{"epoch": 1, "test_top1": None}]),
        ("results", [{"test_top1": 0.5}, {"test_top1": 0.4}]),
        ("epochs", [{"loss": float("nan")}]),
        ("epochs", [{"val_top1": 0.5, "test_top1": 0.5}]),
        ("epochs", [{"val_top1": 0.5}, {"test_top1": 0.5}]),
        ("epochs", [{"test_top1": 0.5}, {"test_top1": 0.4}]),
        ("config", {"data": "/home/ada/data"}),
        ("accuracy", 0.5),
    ],
)
def test_fault_in_a_record_is_reported(tree, key, value):
    (tree / "book/runs/two.json").write_text(json.dumps({**RECORD, key: value}), encoding="utf-8")
    assert "two.json" in "\n".join(problems_in_records(tree))


@pytest.mark.parametrize(
    "epochs",
    [
        [{"train_loss": 2.0}, {"train_loss": 1.0, "val_top1": 0.5}],
        [{"train_loss": 2.0}, {"train_loss": 1.0}],  # nothing held out
        [{"test_top1": 0.25}, {"test_top1": 0.5}],  # as runs were recorded before
        [{"test_top1": 0.5}, {"train_loss": 1.0}],  # the same, and the last epoch was not scored
    ],
)
def test_scores_of_epochs_are_of_one_kind(tree, epochs):
    record = json.dumps({**RECORD, "epochs": epochs})
    (tree / "book/runs/two.json").write_text(record, encoding="utf-8")
    assert problems_in_records(tree) == []


def test_damaged_record_is_reported(tree):
    (tree / "book/runs/two.json").write_text('{"kind": "ben', encoding="utf-8")
    assert "no JSON object" in "\n".join(problems_in_records(tree))
