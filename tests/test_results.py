"""The figures on the landing page and in the README, and the bench that measured them."""

import copy
import json
import re
from functools import partial

import bench
import pytest
import torch
from conftest import ROOT

from xvit_minimal import softmax_attention, xnorm, xnorm_attention

pytest.importorskip("jinja2", reason="it fills the pages: pip install jinja2")
pytest.importorskip("matplotlib", reason="it draws the figure: pip install matplotlib")
pytest.importorskip("nbformat", reason="results.py imports sync.py: pip install nbformat")
import jinja2
import results


@pytest.fixture(scope="module")
def run():
    return results.record()


def test_pages_and_picture_are_those_of_the_record(run):
    assert not results.stale(run)


@pytest.mark.parametrize("page", results.PAGES)
def test_a_figure_changed_by_hand_is_reported(page, run, tmp_path, monkeypatch):
    figures = [f"book/figures/{n}-{mode}.png" for n in results.PICTURES for mode in results.INK]
    for name in [*results.PAGES, *figures]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert not results.stale(run)
    text = (tmp_path / page).read_text()
    figure = f"{results.row(run, 'contiguous', 'forward', 4096)['ratio']:.2f}×"
    assert figure in text
    (tmp_path / page).write_text(text.replace(figure, "99.99×"))
    assert [message for message in results.stale(run) if message.startswith(page)]


def test_a_changed_record_is_reported(run):
    other = copy.deepcopy(run)
    for row in other["results"]:
        row["ratio"] += 1
    assert len(results.stale(other)) == len(results.PAGES) + len(results.PICTURES) * len(
        results.INK
    )


def test_the_two_lines_of_the_first_page_are_the_two_attentions():
    lines = re.search(r"```python\n(.*?)```", (ROOT / "book/index.md").read_text(), re.S)[1]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 20, 8, dtype=torch.float64)  # each (h, N, d)
    lines = [line for line in lines.splitlines() if not line.startswith("#")]
    for line, attention in zip(lines, (softmax_attention, xnorm_attention), strict=True):
        space = {"q": q, "k": k, "v": v, "d": 8, "xnorm": xnorm}
        exec(line, space)
        assert torch.allclose(space["out"], attention(q, k, v))


def test_an_unknown_part_of_a_page_is_refused(run):
    with pytest.raises(ValueError, match="unknown part 'sped', expected one of"):
        results.fill("<!-- from the records: sped -->\n<!-- end -->", run)


def test_a_name_that_a_template_has_and_the_figures_lack_is_an_error(run, monkeypatch):
    figures = results.figures(run)
    del figures["study"]["attentions"][0]["percent"]
    with pytest.raises(jinja2.UndefinedError, match="no attribute 'percent'"):
        results.render("claims", **figures, links=True)
    with pytest.raises(jinja2.UndefinedError, match="'links' is undefined"):
        results.render("claims", **results.figures(run))


def test_plain_claims_are_the_linked_ones_without_links(run):
    parts = results.blocks(run)
    assert "[6](part2/06_a_few_lines)" in parts["claims"]
    assert re.sub(r"\[(\d+)\]\([^)]*\)", r"\1", parts["claims"]) == parts["claims, plain"]


def test_a_column_for_the_gpu_waits_for_its_record(run):
    figures = results.figures(run)
    sides = figures["models"]["sides"]
    sides[0]["gpu"] = {"ratio": 2.5}
    sides[1]["gpu"] = {"ratio": None, "reason": "DeiT ran out of the GPU's memory"}
    _, _, first, second, third, *_ = results.render("models", **figures).splitlines()
    assert first.endswith("| 2.50× |") and second.endswith("| DeiT ran out of the GPU's memory |")
    assert third.endswith("| not yet measured |")


def test_models_are_called_slower_and_faster_only_where_they_are(run):
    figures = results.figures(run)
    rows = results.record("bench/models-cpu.json")["results"]
    rows = [r for r in rows if r["model"] == "xvit_small"]
    slower, faster = figures["models"]["slower"], figures["models"]["faster"]
    assert slower == [r["side"] for r in rows if r["ratio"] < 1 - results.ALIKE]
    assert faster == [r["side"] for r in rows if r["ratio"] > 1 + results.ALIKE]
    figures["models"] |= {"slower": [224, 384], "faster": [1024]}
    text = results.render("models", **figures)
    assert "slower than DeiT at 224 and 384 px and faster at 1,024 px:" in text
    figures["models"] |= {"slower": [], "heavier": False}
    text = results.render("models", **figures)
    assert "slower" not in text and "memory at every size" not in text


def test_records_of_held_out_epochs_and_older_ones_read_alike(run, monkeypatch):
    record = results.record

    def held_out(*name):
        read = record(*name)
        if read["kind"] == "train" and read.get("code", 1) == 1:
            assert any(key.startswith("test_") for row in read["epochs"] for key in row)
            read["epochs"] = [{"epoch": row["epoch"], "val_top1": 0.1} for row in read["epochs"]]
        return read

    expected = results.blocks(run)
    monkeypatch.setattr(results, "record", held_out)
    assert results.blocks(run) == expected


def test_a_run_without_a_test_score_is_refused():
    run = {"command": "python -m xvit_minimal.train", "results": [{"epoch": 1, "val_top1": 0.5}]}
    with pytest.raises(ValueError, match="has epoch, val_top1, expected test_top1: let the run"):
        results.percent(run, "top1")


@pytest.mark.parametrize(
    "number, digits, text",
    [(4096, 0, "4,096"), (0.125, 2, "0.12"), (1234.56, 1, "1,234.6"), (-0.5, 1, "-0.5")],
)
def test_numbers_are_written_with_their_decimals(number, digits, text):
    assert results.fixed(number, digits) == text


def test_slopes_find_the_exponent():
    rows = [
        {
            "what": "x",
            "pass": "forward",
            "tokens": N,
            "batch": B,
            "softmax_seconds": B * N**2,
            "xnorm_seconds": B * N,
            "softmax_peak_bytes": 3 * B * N**2,
            "xnorm_peak_bytes": 5 * B * N,
        }
        for N, B in ((64, 128), (1024, 16), (4096, 4), (16384, 1))
    ]
    rows.append({**rows[1], "batch": 8, "xnorm_seconds": 1.0})  # another batch takes no part
    (fitted,) = bench.slopes(rows)
    assert fitted["softmax_seconds_slope"] == pytest.approx(2) and fitted[
        "xnorm_seconds_slope"
    ] == pytest.approx(1)
    assert fitted["softmax_peak_bytes_slope"] == pytest.approx(2) and fitted[
        "xnorm_peak_bytes_slope"
    ] == pytest.approx(1)


@pytest.mark.parametrize("what", ["contiguous", "views", "module"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_bench_measures_every_kind_of_row(what, backward):
    row = bench.measure(what, 64, 2, backward, rounds=1, device=torch.device("cpu"))
    assert row["tokens"] == 64 and row["batch"] == 2 and row["ratio"] > 0
    result_bytes = 2 * bench.HEADS * 64 * bench.D * 4  # the output alone
    assert row["xnorm_peak_bytes"] >= result_bytes and row["softmax_peak_bytes"] >= result_bytes


def test_the_rows_on_a_cpu_are_those_of_the_record(run):
    rows = [
        (r["tokens"], r["batch"])
        for r in run["results"]
        if (r["what"], r["pass"]) == ("contiguous", "forward")
    ]
    assert bench.shapes(torch.device("cpu")) == rows


def test_slopes_on_a_gpu_are_fitted_to_all_long_sequences():
    shapes = bench.shapes(torch.device("cuda"))
    assert max(N for N, _ in shapes) == 65536 and all(N * B <= bench.GPU_TOKENS for N, B in shapes)
    chosen = [(N, B) for N, B in shapes if N >= min(bench.FITTED)]
    assert all(N * B == bench.GPU_TOKENS for N, B in chosen)
    rows = [
        {
            "what": "x",
            "pass": "forward",
            "tokens": N,
            "batch": B,
            "softmax_seconds": B * N**2,
            "xnorm_seconds": B * N,
            "softmax_peak_bytes": B,
            "xnorm_peak_bytes": B * (1e9 if N == 65536 else 1),
        }
        for N, B in shapes
    ]
    (fitted,) = bench.slopes(rows)
    assert fitted["softmax_seconds_slope"] == pytest.approx(2) and fitted[
        "xnorm_seconds_slope"
    ] == pytest.approx(1)
    assert fitted["xnorm_peak_bytes_slope"] > 1  # the longest sequence counts


@pytest.mark.parametrize(
    "what, passes, peer",
    [
        ("contiguous", False, "softmax"),
        ("views", True, "softmax"),
        ("module", False, "softmax_compiled"),
    ],
)
def test_on_a_gpu_the_compiled_form_is_measured_against_the_rate_of_a_copy(
    what, passes, peer, monkeypatch
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    taken = {}
    in_turn = bench.in_turn
    monkeypatch.setattr(bench, "in_turn", lambda *a: taken.update(in_turn(*a)) or taken)
    plain = bench.measure(what, 64, 2, passes, 1, torch.device("cpu"))
    assert set(taken) == {"softmax", "xnorm"}
    row = bench.measure(what, 64, 2, passes, 1, torch.device("cpu"), rate=1e9)
    assert set(plain) < set(
        row
    )  # only more fields: what reads the record of a CPU reads that of a GPU
    assert row["compiled_ratio"] == taken[peer][0] / taken["xnorm_compiled"][0]
    assert ("softmax_compiled_seconds" in row) == (what == "module") and row[
        "xnorm_compiled_peak_bytes"
    ] > 0
    assert ("bandwidth_share" in row) == (what == "contiguous")
    if what == "contiguous":
        assert row["least_seconds"] == pytest.approx(
            4 * 2 * bench.HEADS * 64 * bench.D * 4 / 1e9
        )  # q, k, v, output; float32
        assert row["bandwidth_share"] == row["least_seconds"] / row["xnorm_compiled_seconds"]
    line = bench.table([row]).splitlines()[-1]
    assert f"{row['compiled_ratio']:.2f}x" in line and line.startswith(
        bench.table([plain]).splitlines()[-1][:40]
    )


def test_every_length_is_compiled_for_itself(monkeypatch):
    """torch gives up compiling a function anew after eight shapes, and then runs it as it is."""
    graphs = []
    monkeypatch.setattr(
        torch,
        "compile",
        partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph),
    )
    lengths = range(2, 12)
    for N in lengths:
        q = torch.randn(1, 2, N, 4)
        bench.call(bench.compiled({"xnorm": bench.xnorm_attention})["xnorm"], (q, q, q), False)
    assert len(graphs) == len(lengths)


def test_the_rate_of_a_copy_counts_bytes_read_and_written(monkeypatch):
    def half_a_second(function, arguments, backward, calls):
        assert torch.equal(bench.call(function, arguments, backward), arguments[0]) and calls > 1
        return 0.5

    monkeypatch.setattr(bench, "seconds", half_a_second)
    assert bench.copy_rate(torch.device("cpu"), size=1000) == 4000


def test_a_record_is_named_after_the_device(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    for gpu, name in ((None, "attention-cpu.json"), ("some GPU", "attention-gpu.json")):
        path = bench.save("attention", {"hardware": {"gpu": gpu}}, 0.0, [{"tokens": 64}])
        assert path == f"book/runs/bench/{name}" and json.loads((tmp_path / path).read_text())[
            "results"
        ] == [{"tokens": 64}]


def test_the_difference_of_the_modules_is_counted():
    assert results.changed_lines() == (1, 3)  # as chapter 6 prints them


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    exec(blocks[0], {})  # the others need trained models: test_train.py and test_dense.py run them
