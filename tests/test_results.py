"""The figures on the landing page and in the README against the records, and the bench that writes the record."""

import copy
import re
import sys

import pytest
import torch
from test_book import ROOT

sys.path.insert(0, str(ROOT / "book"))
import bench  # noqa: E402
import results  # noqa: E402


@pytest.fixture(scope="module")
def run():
    return results.record()


def test_pages_and_picture_are_those_of_the_record(run):
    assert not results.stale(run)


@pytest.mark.parametrize("page", results.PAGES)
def test_a_figure_changed_by_hand_is_reported(page, run, tmp_path, monkeypatch):
    for name in [*results.PAGES, "book/figures/cost-light.png", "book/figures/cost-dark.png"]:
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
    assert len(results.stale(other)) == len(results.PAGES) + len(results.INK)


def test_an_unknown_part_of_a_page_is_refused(run):
    with pytest.raises(ValueError, match="unknown part 'sped', expected one of"):
        results.fill("<!-- from the records: sped -->\n<!-- end -->", run)


def test_slopes_find_the_exponent():
    rows = [{"what": "x", "pass": "forward", "tokens": N, "batch": B, "softmax_seconds": B * N**2, "xnorm_seconds": B * N,
             "softmax_peak_bytes": 3 * B * N**2, "xnorm_peak_bytes": 5 * B * N}
            for N, B in ((64, 128), (1024, 16), (4096, 4), (16384, 1))]
    rows.append({**rows[1], "batch": 8, "xnorm_seconds": 1.0})  # another batch takes no part
    (fitted,) = bench.slopes(rows)
    assert fitted["softmax_seconds_slope"] == pytest.approx(2) and fitted["xnorm_seconds_slope"] == pytest.approx(1)
    assert fitted["softmax_peak_bytes_slope"] == pytest.approx(2) and fitted["xnorm_peak_bytes_slope"] == pytest.approx(1)


@pytest.mark.parametrize("what", ["contiguous", "views", "module"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_bench_measures_every_kind_of_row(what, backward):
    row = bench.measure(what, 64, 2, backward, rounds=1, device=torch.device("cpu"))
    assert row["tokens"] == 64 and row["batch"] == 2 and row["ratio"] > 0
    result_bytes = 2 * bench.HEADS * 64 * bench.D * 4  # the output alone
    assert row["xnorm_peak_bytes"] >= result_bytes and row["softmax_peak_bytes"] >= result_bytes


def test_the_difference_of_the_modules_is_counted():
    assert results.changed_lines() == (1, 3)  # as chapter 6 prints them


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], {})  # the other one needs a trained model: test_train.py runs it
