"""The bench of training steps: what it records, and that each process does as it is asked."""

import inspect
import json

import bench
import bench_training
import pytest
from test_records import problems_in_records


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Rounds without timing: float32 takes 2 s, 1 s with memory kept, bfloat16 half of either."""

    def in_a_process(way, names):
        base = {"given back": 2.0, "kept": 1.0}[way]
        steps = {name: {"float32": base, "bfloat16": base / 2} for name in names}
        return {"steps": steps, "rates": {"float32": 1e10, "bfloat16": 4e10}}

    provenance = bench.provenance
    monkeypatch.setattr(bench_training, "in_a_process", in_a_process)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(
        bench, "provenance", lambda device: {**provenance(device), "commit": "0123abcd"}
    )  # may be dirty
    return tmp_path


def test_the_record_holds_every_step_in_four_ways(made_up, capsys):
    bench_training.main([])
    assert not problems_in_records(made_up)
    record = json.loads((made_up / "book/runs/bench/training-cpu.json").read_text())
    rows = record["results"]
    assert [(r["model"], r["dtype"], r["freed_memory"]) for r in rows] == [
        (name, dtype, way)
        for name in bench_training.STEPS
        for dtype in bench_training.DTYPES
        for way in bench_training.WAYS
    ]
    assert [r["ratio"] for r in rows[:4]] == [1, 2, 2, 4]
    for r in rows:
        taken = r["share_of_products"] * r["seconds"] * r["products_per_second"]
        assert taken == pytest.approx(r["multiply_adds"])
    assert "recorded in" in capsys.readouterr().out


def test_quick_records_nothing(made_up, capsys):
    bench_training.main(["--quick"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    assert not (made_up / "book").exists()


def test_a_process_measures_what_it_is_asked_for(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(bench_training, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(bench_training, "measure", lambda names: names)
    bench_training.main(["--measure", "given back", "xvit_pico", "CamVid"])
    assert json.loads(capsys.readouterr().out) == ["xvit_pico", "CamVid"] and not kept
    bench_training.main(["--measure", "kept", "xvit_pico"])
    assert kept


@pytest.mark.parametrize("name", bench_training.STEPS)
def test_a_step_leaves_no_gradient_and_counts_three_passes(name):
    step, multiply_adds = bench_training.training_step(name, "float32")
    step()
    config, pictures, size = bench_training.STEPS[name]
    task = bench_training.TASKS[config.task]
    _, forward = task.cost(task.model(config, bench_training.CLASSES, size), size)
    assert multiply_adds == 3 * pictures * forward
    model = inspect.getclosurevars(step).nonlocals["model"]
    assert all(p.grad is None for p in model.parameters())
