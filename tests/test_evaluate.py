"""evaluate.py, which puts trained weights to images, and the weights that ship with the book."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

pytest.importorskip("safetensors", reason="weights are files of it: pip install safetensors")
import evaluate
from safetensors import safe_open

from xvit_minimal import data, train, weights
from xvit_minimal.recipe import recipe
from xvit_minimal.tasks import TASKS, Classification


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny run on drawn shapes."""
    folder = tmp_path_factory.mktemp("run")
    train.train(
        recipe(
            "shapes",
            out=str(folder),
            dim=16,
            depth=1,
            num_heads=2,
            size=16,
            limit=64,
            epochs=1,
            batch_size=32,
            device="cpu",
        )
    )
    return folder


@pytest.fixture
def record(run, tmp_path, monkeypatch):
    """A function that evaluates the run with more options and returns what evaluate.py recorded."""
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)

    def call(*options):
        evaluate.main(
            [str(run / "weights.safetensors"), "--data", "shapes", *options, "--out", "some"]
        )
        return json.loads((tmp_path / "book/runs/evaluate/some.json").read_text())

    return call


def test_rows_are_what_the_training_loop_finds(run, record):
    found = record("--sizes", "16", "24", "--mistakes", "5")
    assert found["kind"] == "evaluate" and found["command"].startswith(
        "python book/tools/evaluate.py "
    )
    assert [row["side"] for row in found["results"]] == [16, 24]
    model, classes = train.load_model(run / "weights.safetensors")
    for row in found["results"]:
        tests = data.load("shapes", "test", row["side"])
        expected = Classification.evaluate(model, tests)
        assert row["top1"] == pytest.approx(expected["top1"]) and row["loss"] == pytest.approx(
            expected["loss"], rel=1e-4
        )
        assert (
            row["images"] == len(tests)
            and row["classes"] == list(classes)
            and row["copy"] == tests.copy
        )
        confusion = torch.tensor(row["confusion"])
        assert confusion.sum(1).tolist() == torch.bincount(tests.labels).tolist()
        assert confusion.trace().item() == pytest.approx(row["top1"] * len(tests))
        sure = [error["probability"] for error in row["mistakes"]]
        assert len(sure) == 5 and sure == sorted(sure, reverse=True)
        for error in row["mistakes"]:
            p = model(data.normalize(tests.images[error["index"]][None])).softmax(1)[0]
            assert tests.labels[error["index"]] == error["label"] != error["guess"] == p.argmax()
            assert p.max().item() == pytest.approx(error["probability"], abs=1e-4)


def test_the_side_is_the_trained_one_and_nothing_more_is_kept_unasked(record):
    (row,) = record()["results"]
    assert row["side"] == 16 and "confusion" not in row and "mistakes" not in row


def test_jpeg_compares_the_same_images(record):
    plain, squeezed = record("--jpeg", "5")["results"]
    assert squeezed["jpeg"] == 5 and "jpeg" not in plain and squeezed["loss"] != plain["loss"]
    change = (squeezed["right_after_only"] - squeezed["right_before_only"]) / plain["images"]
    assert squeezed["top1"] - plain["top1"] == pytest.approx(change)
    assert (
        squeezed["right_after_only"] + squeezed["right_before_only"] > 0
    )  # quality 5 moves something


def test_shipped_weights_are_halves_of_the_run_s(run, record, tmp_path):
    target = tmp_path / "weights/some.safetensors"
    (row,) = record("--ship", str(target))["results"]
    assert (
        row["weights"] == target.as_posix()
        and row["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    )
    with safe_open(run / "weights.safetensors", "pt") as whole, safe_open(target, "pt") as half:
        assert whole.metadata() == half.metadata() and sorted(whole.keys()) == sorted(half.keys())
        for name in half.keys():
            tensor = half.get_tensor(name)
            assert tensor.dtype in (torch.float16, torch.int64)
            assert torch.equal(tensor, whole.get_tensor(name).to(tensor.dtype))
    model, _ = train.load_model(target)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_set_of_other_classes_is_refused_and_nothing_is_written(record, tmp_path, monkeypatch):
    other = replace(data.shapes(8, 16), classes=("a", "b", "c", "d"))
    monkeypatch.setattr(data, "load", lambda *arguments: other)
    with pytest.raises(SystemExit, match="knows the classes .* choose a set with the same ones"):
        record()
    with pytest.raises(SystemExit, match="knows the classes"):
        record("--ship", str(tmp_path / "half.safetensors"))
    assert not (tmp_path / "book").exists() and not (tmp_path / "half.safetensors").exists()


def test_a_score_that_is_no_number_leaves_nothing_half_written(record, tmp_path, monkeypatch):
    found = {"top1": float("nan"), "data": "shapes", "side": 16}
    monkeypatch.setattr(evaluate, "row", lambda *arguments: (dict(found), None))
    with pytest.raises(SystemExit, match="error: Out of range float values"):
        record("--ship", str(tmp_path / "half.safetensors"))
    assert not (tmp_path / "book").exists() and not (tmp_path / "half.safetensors").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["gone.safetensors"], "error: .*gone.safetensors: no such file"),
        (["."], "error: .* is a folder: give the path of the weights.safetensors"),
        (["foreign.safetensors"], "error: foreign.safetensors is not a weights.safetensors"),
        (["RUN", "detector.safetensors"], "is for classification and .* for detection"),
        (["detector.safetensors", "--jpeg", "50"], "got --jpeg for detection"),
        (["RUN", "--data", "shapse"], "expected one of"),
    ],
)
def test_what_cannot_be_evaluated_ends_with_one_line(run, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.safetensors").write_bytes(b"something else")
    config = recipe("shapes", "detection", dim=8, depth=1, num_heads=2, pyramid=16)
    model = TASKS["detection"].model(config, 4, 32)
    content = weights.weights_file(model, vars(config), data.KINDS, 32)
    (tmp_path / "detector.safetensors").write_bytes(content)
    words = [str(run / "weights.safetensors") if word == "RUN" else word for word in options]
    words += ["--out", "some", *([] if "--data" in options else ["--data", "shapes"])]
    with pytest.raises(SystemExit, match=message) as end:
        evaluate.main(words)
    assert len(str(end.value).splitlines()) == 1 and not (tmp_path / "book").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["b", "--ship", "c.safetensors"], "got 2 files to --ship, expected one"),
        (["--ship", "a"], "the file that is read: name another one"),
        (["--ship", "x/../a"], "the file that is read: name another one"),
        (["--ship", "."], "expected the path of a file NAME.safetensors"),
        (["--jpeg", "0"], "expected a quality from 1 to 100"),
        (["--jpeg", "101"], "expected a quality from 1 to 100"),
        (["--sizes", "0"], "sizes below 1"),
        (["--mistakes", "-1"], "negative --mistakes"),
        (["--split", "train"], "invalid choice: 'train'"),
        (["--out", "../x"], "expected a name of letters"),
        (["--out", "a/b"], "expected a name of letters"),
        (["--out", ""], "expected a name of letters"),
        (
            [
                "--out",
                "..",
            ],
            "expected a name of letters",
        ),
    ],
)
def test_options_that_make_no_sense_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(
            ["a", *options, "--data", "shapes", *([] if "--out" in options else ["--out", "x"])]
        )
    assert end.value.code == 2 and message.lower() in capsys.readouterr().err.lower()


def test_the_validation_part_is_evaluated_where_it_is_asked_for(record, monkeypatch):
    asked, whole = [], data.load
    monkeypatch.setattr(
        data,
        "load",
        lambda name, split, *rest: (asked.append(split), whole(name, "test", *rest))[1],
    )
    (row,) = record("--split", "val")["results"]
    assert asked == ["val"] and row["top1"] >= 0


SHIPPED = sorted((ROOT / "book/weights").glob("*.safetensors"))


def test_something_ships():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_weights_lead_to_their_records(path):
    """Small, in half precision, evaluated as they are, and made by a run whose record is here."""
    assert path.stat().st_size < 5_000_000
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}
    evaluated = [
        row
        for other in (ROOT / "book/runs/evaluate").glob("*.json")
        for row in json.loads(other.read_text())["results"]
        if row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    ]
    assert evaluated, (
        "no record in book/runs/evaluate/ has its checksum: run book/tools/evaluate.py --ship again"
    )
    runs = [json.loads(other.read_text()) for other in (ROOT / "book/runs/train").rglob("*.json")]
    mine = [
        r
        for r in runs
        if {k: v for k, v in r["config"].items() if k not in ("out", "device")} == about["config"]
    ]
    assert len(mine) == 1, "no record in book/runs/train/ has its configuration"
    model, _ = train.load_model(path)
    assert sum(p.numel() for p in model.parameters()) == mine[0]["parameters"]
    same = [row for row in evaluated if row["copy"] in mine[0]["data"]["copy"]]
    assert any(
        abs(row[score := row.get("score", "top1")] - mine[0]["results"][0][f"test_{score}"]) < 0.005
        for row in same
    )


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_dense_task_gets_its_own_scores(task, tmp_path, monkeypatch):
    images = TASKS[task].load(recipe("shapes", task, size=32, limit=8), "train", 8)
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    monkeypatch.setattr(TASKS[task], "load", staticmethod(lambda config, split, limit: images))
    train.train(
        recipe(
            "shapes",
            task,
            out=str(tmp_path / "run"),
            dim=16,
            depth=1,
            num_heads=2,
            epochs=1,
            batch_size=8,
            pyramid=16,
            device="cpu",
        )
    )
    evaluate.main(
        [
            str(tmp_path / "run/weights.safetensors"),
            "--data",
            "shapes",
            "--mistakes",
            "1",
            "--ship",
            str(tmp_path / "half.safetensors"),
            "--out",
            "some",
        ]
    )
    (row,) = json.loads((tmp_path / "book/runs/evaluate/some.json").read_text())["results"]
    model, classes = train.load_model(tmp_path / "half.safetensors")
    expected = TASKS[task].evaluate(model, images)
    if task == "detection":  # the set is its own validation part here
        assert row["threshold"] == expected["best_threshold"] == model.score_thresh
        assert (
            row["val_f1"] == pytest.approx(expected["best_f1"]) and row["val_copy"] == images.copy
        )
    assert {key: row[key] for key in expected} == pytest.approx(expected) and row["score"] == TASKS[
        task
    ].score
    assert row["images"] == 8 and ("precision" in row) == (task == "detection")
    if task == "detection":
        assert all(
            len(curve) == 101 and kind in classes for kind, curve in row["precision"].items()
        )
        assert sum(sum(c) for c in row["precision"].values()) / 101 / len(
            row["precision"]
        ) == pytest.approx(row["map50"], abs=1e-5)


@pytest.mark.parametrize(
    "script, package, words, message",
    [
        ("bench_models.py", "timm", [], "error: the bench needs XCiT and DeiT from timm"),
        ("evaluate.py", "safetensors", ["bccd"], "error: reading weights needs safetensors"),
        ("evaluate.py", "torchmetrics", ["bccd"], "error: detection needs torchmetrics"),
        ("evaluate.py", "pycocotools", ["bccd"], "error: detection needs pycocotools"),
    ],
)
def test_a_script_says_which_package_it_misses(script, package, words, message):
    """In a process of its own, in which the package cannot be imported."""
    code = (
        "import runpy, sys; sys.modules[sys.argv.pop(1)] = None\n"
        "sys.argv = sys.argv[1:]; sys.path.insert(0, 'book/tools')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [f"book/weights/{name}.safetensors" for name in words]
    options = [*words, "--data", "bccd", "--out", "never"] if words else []
    command = [sys.executable, "-c", code, package, f"book/tools/{script}", *options]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    (line,) = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and line.startswith(message) and "pip install" in line
    assert not (ROOT / "book/runs/evaluate/never.json").exists()
