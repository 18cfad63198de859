"""The bench of a segmentation step: what it records, and which attentions it drops.

The body has a few thousand parameters.
"""

import json

import bench
import bench_dense
import pytest
import torch
from test_records import problems_in_records

from xvit_minimal import SoftmaxAttention


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Two sizes and a small body; returns the folder and what reads the record."""
    provenance = bench.provenance
    monkeypatch.setattr(bench_dense, "SIZES", {"cpu": [(32, 40), (65, 40)]})
    monkeypatch.setattr(
        bench_dense, "BODY", {**bench_dense.BODY, "dim": 8, "depth": 1, "num_heads": 2}
    )
    monkeypatch.setattr(bench_dense, "ROUNDS", 2)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(
        bench, "provenance", lambda device: {**provenance(device), "commit": "0123abcd"}
    )  # may be dirty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path, lambda: json.loads((tmp_path / "book/runs/bench/dense-cpu.json").read_text())


def test_the_record_holds_every_attention_at_every_size(tiny, capsys):
    folder, read = tiny
    bench_dense.main([])
    assert not problems_in_records(folder)
    rows, printed = read()["results"], capsys.readouterr().out
    assert [(r["height"], r["tokens"], r["model"]) for r in rows] == [
        (H, N, name) for H, N in ((32, 80), (65, 170)) for name in bench_dense.METHODS
    ]
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 0 and "reason" not in r for r in rows)
    assert all(
        r["ratio"] == r["ratio_min"] == r["ratio_max"] == 1 for r in rows if r["model"] == "xnorm"
    )
    assert len(printed.splitlines()) == 2 + len(rows) + 1
    assert set(read()["config"]["parameters"]) == set(bench_dense.METHODS)


def test_who_takes_too_long_gets_one_step_and_no_further_size(tiny, monkeypatch):
    _, read = tiny

    def slow_softmax(model, *_):
        attention = model.backbone.body.blocks[0].attention.part
        return 99.0 if type(attention) is SoftmaxAttention else 0.1  # XCA is a subclass

    monkeypatch.setattr(bench_dense, "seconds", slow_softmax)
    bench_dense.main([])
    rows = read()["results"]
    assert [r["height"] for r in rows if r["model"] == "softmax"] == [32]
    assert [r["height"] for r in rows if r["model"] == "xca"] == [32, 65]
    (row,) = (r for r in rows if r["model"] == "softmax")
    assert row["seconds"] is None and row["first_seconds"] == 99 and "more than 30" in row["reason"]


def test_who_runs_out_of_memory_is_named(tiny, monkeypatch):
    _, read = tiny

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(bench_dense, "peak_bytes", full)
    bench_dense.main([])
    rows = read()["results"]
    assert len(rows) == 3 and all(r["seconds"] is None for r in rows)


def test_quick_records_nothing(tiny, capsys):
    folder, _ = tiny
    bench_dense.main(["--quick"])
    assert not (folder / "book").exists() and "32x40" in capsys.readouterr().out


def test_all_attentions_get_the_same_body():
    weights = [bench_dense.build(name, (16, 16)).state_dict() for name in ("xnorm", "softmax")]
    shared = [name for name in weights[1] if name in weights[0]]
    assert len(shared) == len(weights[1]) and all(
        torch.equal(weights[0][n], weights[1][n]) for n in shared
    )
