"""The records of runs in book/runs: what each has to say, where it was measured, and nothing of one machine."""

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
OPTIONAL = {"slopes"}  # fitted to the rows of a bench


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
        ("epochs", [{"loss": float("nan")}]),
        ("config", {"data": "/home/ada/data"}),
        ("accuracy", 0.5),
    ],
)
def test_fault_in_a_record_is_reported(tree, key, value):
    (tree / "book/runs/two.json").write_text(json.dumps({**RECORD, key: value}), encoding="utf-8")
    assert "two.json" in "\n".join(problems_in_records(tree))


def test_damaged_record_is_reported(tree):
    (tree / "book/runs/two.json").write_text('{"kind": "ben', encoding="utf-8")
    assert "no JSON object" in "\n".join(problems_in_records(tree))
