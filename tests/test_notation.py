"""The page of symbols against the chapters' numbered equations."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book/notation.md").read_text()
CHAPTERS = {int(path.name[:2]): path for path in (ROOT / "book").glob("part*/*.ipynb")}
WORDS = r"\\(?:mathrm|operatorname|text|mathtt|begin|end|underbrace)\*?\s*\{[^{}]*\}"
STYLED = r"\\(?:mathcal|mathbb|mathbf)\s*\{?([A-Za-z1])\}?"
GREEK = (
    "alpha beta gamma delta epsilon varepsilon eta theta kappa lambda mu phi varphi rho sigma tau "
    "omega ell"
).split()


def letters(tex):
    """The letters in a formula, such as {"x", "gamma"}: no names of functions, no commands."""
    tex = re.sub(WORDS, " ", tex)
    styled = {f"styled {letter}" for letter in re.findall(STYLED, tex)} & {"styled L", "styled E"}
    tex = re.sub(STYLED, " ", tex)
    commands = set(re.findall(r"\\([A-Za-z]+)", tex)) & set(GREEK)
    return styled | commands | set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", tex)))


def numbered(path):
    """{name: formula} of a chapter's numbered equations."""
    found = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            parts = text.split("$$")
            for formula, after in zip(parts[1::2], parts[2::2]):
                if name := re.match(r" \((eq-[\w-]+)\)", after):
                    found[name[1]] = formula
    return found


def rows(number):
    """The rows of the page's first or second table, cell by cell."""
    table = re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.M)[number]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def symbols(text):
    return set().union(*map(letters, re.findall(r"\$(.*?)\$", text)))


EVERYWHERE = set().union(*(symbols(row[0]) for row in rows(0)))
OWN = {int(chapter): symbols(text) for chapter, text in rows(1)}


@pytest.mark.parametrize("chapter", sorted(CHAPTERS))
def test_every_letter_of_a_numbered_equation_is_on_the_page(chapter):
    used = {name: letters(formula) for name, formula in numbered(CHAPTERS[chapter]).items()}
    assert used, "a chapter without equations: is the pattern still right?"
    unknown = {name: found - EVERYWHERE - OWN[chapter] for name, found in used.items()}
    assert not {name: found for name, found in unknown.items() if found}


@pytest.mark.parametrize("chapter", sorted(CHAPTERS))
def test_no_letter_is_listed_for_a_chapter_that_does_not_use_it(chapter):
    used = set().union(*map(letters, numbered(CHAPTERS[chapter]).values()))
    assert OWN[chapter] <= used


def test_the_letters_of_all_chapters_are_used():
    used = set()
    for path in CHAPTERS.values():
        used |= set().union(*map(letters, numbered(path).values()))
    assert EVERYWHERE <= used


@pytest.mark.parametrize(
    "tex, expected",
    [
        (r"\mathrm{softmax}(s + \delta)", {"s", "delta"}),
        (r"\lVert \hat x \rVert \le \mathcal{L}", {"x", "styled L"}),
        (r"\mathbb E\,[\ell_i] \in \mathbb{R}", {"styled E", "ell", "i"}),
        (r"\frac{\partial \mathcal L}{\partial V_{mj}}", {"styled L", "V", "m", "j"}),
    ],
)
def test_letters_are_found(tex, expected):
    assert letters(tex) == expected
