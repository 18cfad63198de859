"""The bench of whole models: what it records, and what it does when memory runs out.

The models have a few thousand parameters.
"""

import json
from functools import partial

import pytest
import torch

pytest.importorskip("timm", reason="timm holds XCiT and DeiT: pip install timm")
import bench
import bench_models
from test_records import problems_in_records

from xvit_minimal import XViT

CPU = torch.device("cpu")
ROW = {
    "model",
    "side",
    "tokens",
    "batch",
    "compiled",
    "dtype",
    "images_per_second",
    "images_per_second_min",
    "images_per_second_max",
    "ratio",
    "ratio_min",
    "ratio_max",
    "peak_bytes",
    "parameters",
}
MEASURED = {
    "images_per_second",
    "images_per_second_min",
    "images_per_second_max",
    "ratio",
    "ratio_min",
    "ratio_max",
    "peak_bytes",
}


class Small(XViT):
    """A model that a GPU has room for up to `largest` pixels."""

    def __init__(self, side, depth=1, largest=64):
        super().__init__(img_size=side, num_classes=2, dim=16, depth=depth, num_heads=2)
        self.largest = largest

    def forward(self, x):
        if x.shape[-1] > self.largest:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(x)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Two small models at two sizes of image: (table of models, folder, reader of the record)."""
    models = {"one": Small, bench_models.PEER: partial(Small, depth=3)}
    provenance = bench.provenance
    monkeypatch.setattr(bench_models, "MODELS", models)
    monkeypatch.setattr(bench_models, "BATCHES", {"cpu": {32: 2, 64: 1}})
    monkeypatch.setattr(bench_models, "ROUNDS", 2)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(
        bench, "provenance", lambda device: {**provenance(device), "commit": "0123abcd"}
    )  # may be dirty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return (
        models,
        tmp_path,
        lambda: json.loads((tmp_path / "book/runs/bench/models-cpu.json").read_text()),
    )


def test_the_record_holds_every_model_at_every_size(tiny, capsys):
    models, folder, read = tiny
    bench_models.main([])
    assert not problems_in_records(folder)
    run, printed = read(), capsys.readouterr().out
    assert "timm" in run["versions"] and run["hardware"]["gpu"] is None
    assert [(r["side"], r["batch"], r["tokens"], r["model"]) for r in run["results"]] == [
        (side, batch, tokens, name)
        for side, batch, tokens in ((32, 2, 4), (64, 1, 16))
        for name in models
    ]
    for r in run["results"]:
        assert set(r) == ROW and r["dtype"] == "float32" and not r["compiled"]
        assert (
            0 < r["images_per_second_min"] <= r["images_per_second"] <= r["images_per_second_max"]
        )
        assert r["ratio_min"] <= r["ratio"] <= r["ratio_max"]
        assert r["parameters"] == sum(p.numel() for p in models[r["model"]](r["side"]).parameters())
        # the stem's first result, of 16 / 8 channels, is one that the model holds
        stem = r["batch"] * 2 * (r["side"] // 2) ** 2 * 4
        assert r["peak_bytes"] >= stem
        assert r["ratio"] == 1 if r["model"] == bench_models.PEER else r["ratio"] > 0
        assert f"{r['images_per_second']:.1f}" in printed


def test_a_ratio_is_taken_within_a_round(tiny, monkeypatch):
    seconds = {"one": [1.0, 2.0, 6.0], bench_models.PEER: [2.0, 6.0, 6.0]}  # of a call
    monkeypatch.setattr(bench_models, "in_turn", lambda *_: seconds)
    one, peer = bench_models.measure(32, 12, False, 3, CPU)
    speeds = [one[f"images_per_second{end}"] for end in ("_min", "", "_max")]
    assert speeds == [2, 6, 12]
    assert (one["ratio_min"], one["ratio"], one["ratio_max"]) == (1, 2, 3)
    assert peer["ratio_max"] == 1


@pytest.mark.parametrize("name, others_ratio", [("one", 1), (bench_models.PEER, None)])
def test_a_model_without_memory_does_not_lose_the_rest(name, others_ratio, tiny, capsys):
    models, folder, read = tiny
    models[name] = partial(models[name], largest=32)
    bench_models.main([])
    assert not problems_in_records(folder)
    small, large = ([r for r in read()["results"] if r["side"] == side] for side in (32, 64))
    assert all(r["ratio"] > 0 and "reason" not in r for r in small)
    (failed,) = [r for r in large if r["model"] == name]
    (other,) = [r for r in large if r["model"] != name]
    assert {key for key, value in failed.items() if value is None} == MEASURED
    assert (
        failed["reason"] == f"{name} ran out of the GPU's memory"
        and failed["reason"] in capsys.readouterr().out
    )
    assert (
        other["images_per_second"] > 0
        and other["peak_bytes"] > 0
        and other["ratio"] == others_ratio
    )
    assert other.get("reason") == (failed["reason"] if others_ratio is None else None)


def test_a_run_that_is_cut_short_has_recorded_what_it_did(tiny, monkeypatch):
    models, folder, read = tiny
    measure = bench_models.measure

    def cut(side, *rest):
        if side == 64:
            raise KeyboardInterrupt
        return measure(side, *rest)

    monkeypatch.setattr(bench_models, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        bench_models.main([])
    assert not problems_in_records(folder)
    assert [(r["side"], r["model"]) for r in read()["results"]] == [(32, name) for name in models]


def test_quick_records_nothing(tiny, capsys):
    _, folder, _ = tiny
    bench_models.main(["--quick"])
    assert f"{bench_models.PEER:>24} {32:>5}" in capsys.readouterr().out
    assert not list(folder.rglob("*.json"))


def test_compiled_models_are_the_ones_that_are_measured(tiny, monkeypatch):
    models, _, _ = tiny
    measured = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(
        bench_models, "peak_bytes", lambda function, *rest: measured.append(function) or 1
    )
    rows = bench_models.measure(32, 1, True, 1, CPU)
    assert [type(f).__name__ for f in measured] == ["OptimizedModule"] * len(models)
    assert all(r["compiled"] and r["images_per_second"] > 0 for r in rows)


@pytest.mark.parametrize("name", bench_models.MODELS)
def test_every_model_takes_every_size(name):
    assert set(bench_models.BATCHES["cpu"]) == set(bench_models.BATCHES["cuda"])
    for side in bench_models.BATCHES["cpu"]:
        with torch.device("meta"):  # shapes without numbers
            out = bench_models.MODELS[name](side).eval()(torch.empty(1, 3, side, side))
        assert out.shape == (1, 1000)
