"""Each chapter by itself, checked without running it: its claims, outputs, figures and form.

A check is a function `problems_in_...` that returns one sentence for each fault: where it is and
what to do. Below each check stand small faults that it has to report. At the end of the file, all
checks are put to a chapter without a fault (conftest.py) and to the real ones. test_sync.py holds
what the chapters share: the package, the contents, the records.
"""

import ast
import re

import pytest
from conftest import MACHINE_PATH, ROOT

nbformat = pytest.importorskip("nbformat", reason="the tests read notebooks: pip install nbformat")

CHAPTERS = sorted(
    p for p in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)

LABEL = r"eq-[a-z0-9]+(?:-[a-z0-9]+)*"
FLOAT64, LOWER = {"float64", "double"}, {"float", "float32", "float16", "bfloat16", "half"}
KNOWN_TAGS = {"setup", "hide-cell", "hide-input", "hide-output", "nbval-ignore-output"}
MARKER = r"(?m)^\s*#\s*NBVAL_IGNORE_OUTPUT\s*$"
HEADINGS = ["## What the package gained", "## Summary", "## Exercises", "## Sources"]


def read(path):
    return nbformat.read(path, as_version=4)


def where(path, index):
    return f"{path.name}, cell {index}"


def cells(path, kind):
    """(index, cell) of the notebook's code or markdown cells."""
    return [(i, c) for i, c in enumerate(read(path).cells) if c.cell_type == kind]


def first_line(cell):
    return cell.source.split("\n", 1)[0]


def nodes(cell):
    """The nodes of a cell's syntax tree; none if it is not Python (see problems_in_execution)."""
    try:
        return list(ast.walk(ast.parse(cell.source)))
    except SyntaxError:
        return []


def asserts(cell):
    return any(
        isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant) for n in nodes(cell)
    )


def names(cell):
    """Every name, attribute and string in a cell's code (comments are no code)."""
    fields = {ast.Name: "id", ast.Attribute: "attr", ast.Constant: "value"}
    return {getattr(n, fields[type(n)]) for n in nodes(cell) if type(n) in fields}


def ignored(cell):
    return "nbval-ignore-output" in cell.metadata.get("tags", []) or bool(
        re.search(MARKER, cell.source)
    )


def images(cell):
    return [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]


def texts(cell):
    """What a cell's outputs say, pictures left out."""
    for output in cell.get("outputs", []):
        yield output.get("text", "") + "\n".join(output.get("traceback", []))
        yield from (
            str(data)
            for kind, data in output.get("data", {}).items()
            if not kind.startswith("image/p")
        )


def prose(text, keep_math=True):
    """Markdown without its code, and on demand without its mathematics."""
    text = re.sub(r"(?ms)^[ \t]*(```+|~~~+).*?^[ \t]*\1[ \t]*$", "", text)
    text = re.sub(r"(?s)(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)
    return text if keep_math else re.sub(r"(?s)\$\$.*?\$\$|\$[^$\n]+\$", "", text)


# ----------------------------------------------------------------------------- equations and checks


def labels(path):
    """[(cell index, label)] of the well-formed labelled equations."""
    return [
        (i, label)
        for i, c in cells(path, "markdown")
        for label in re.findall(rf"(?m)\$\$ \(({LABEL})\)$", prose(c.source))
    ]


def problems_in_equations(path):
    problems, checks, float64 = [], [], False
    defined = [label for _, label in labels(path)]
    for i, cell in cells(path, "markdown"):
        text = prose(cell.source)
        if text.count("$$") % 2:
            problems.append(f"{where(path, i)}: an odd number of $$: close the display")
        for tail in re.findall(r"(?s)\$\$.+?\$\$([^\n]*)", text):
            if tail.strip() and not re.fullmatch(rf" \({LABEL}\)", tail):
                problems.append(
                    f"{where(path, i)}: malformed label {tail!r}: close with `$$ (eq-name)` or `$$`"
                )
        for line in text.splitlines():
            if re.fullmatch(r"\s*\(\s*eq[-_: ][^)]*\)\s*", line) or re.search(r"\(eq[_: ]", line):
                problems.append(
                    f"{where(path, i)}: malformed label {line.strip()!r}: write `$$ (eq-name)` on "
                    "the line that closes the display"
                )
    for i, cell in cells(path, "code"):
        # here or in an earlier cell; NumPy's and Python's numbers have it
        float64 |= bool(FLOAT64 & names(cell))
        good = re.fullmatch(rf"# check: ({LABEL})", first_line(cell))
        if len(re.findall(r"(?im)^\s*#+\s*check\s*(?::|\(?eq\b)", cell.source)) > bool(good):
            problems.append(
                f"{where(path, i)}: malformed check: `# check: eq-name` is a cell's first line, "
                "once"
            )
        if not good:
            continue
        checks.append(good[1])
        if good[1] not in defined:
            problems.append(
                f"{where(path, i)}: checks {good[1]}, which labels no equation of this chapter: "
                "label it"
            )
        if checks.count(good[1]) > 1:
            problems.append(f"{where(path, i)}: a second check of {good[1]}: make one cell of them")
        if not asserts(cell):
            problems.append(
                f"{where(path, i)}: the check of {good[1]} asserts nothing: add an assert"
            )
        lower = LOWER & {n.attr for n in nodes(cell) if isinstance(n, ast.Attribute)}
        if lower and not FLOAT64 & names(cell) or not float64 and "torch" in names(cell):
            problems.append(
                f"{where(path, i)}: the check of {good[1]} is not in float64: give its tensors "
                "that dtype"
            )
        if ignored(cell) or set(cell.metadata.get("tags", [])) & {"nbval-skip", "raises-exception"}:
            problems.append(
                f"{where(path, i)}: the check of {good[1]} carries a tag that disarms it: "
                "take the tag off"
            )
    problems += [
        f"{where(path, i)}: equation {label} has no check: add a cell that starts with "
        f"`# check: {label}`"
        for i, label in labels(path)
        if label not in checks
    ]
    return problems


CHECK = "# check: eq-double\nx = torch.ones(3, dtype=torch.float64)\n"


@pytest.mark.parametrize(
    "index, fields, complaint",
    [
        (2, {"source": "$$ 2x = x + x $$"}, "labels no equation"),
        (2, {"source": "$$ 2x = x + x $$\n(eq-double)"}, "malformed label"),
        (2, {"source": "$$ 2x = x + x $$ (eq_double)"}, "malformed label"),
        (2, {"source": "$$ 2x = x + x $$(eq-double)"}, "malformed label"),
        (2, {"source": "$$ 2x $$ (eq-double)\n\n$$ 3x"}, "odd number"),
        (3, {"source": "assert 1 + 1 == 2"}, "has no check"),
        (3, {"source": CHECK.replace("# c", "#c") + "assert x.sum() == 3"}, "malformed check"),
        (3, {"source": CHECK.replace("check", "Check") + "assert x.sum() == 3"}, "malformed check"),
        (3, {"source": "\n" + CHECK + "assert x.sum() == 3"}, "malformed check"),
        (3, {"source": CHECK + "x.sum() == 3"}, "asserts nothing"),
        (3, {"source": CHECK + "assert True"}, "asserts nothing"),
        (
            3,
            {"source": "# check: eq-double\nx = torch.ones(3)  # not float64\nassert x.sum() == 3"},
            "not in float64",
        ),
        (
            3,
            {"source": "# check: eq-double\nx = np.ones(3, np.float32)\nassert x.sum() == 3"},
            "not in float64",
        ),
        (3, {"metadata": {"tags": ["nbval-ignore-output"]}}, "disarms"),
        (3, {"metadata": {"tags": ["raises-exception"]}}, "disarms"),
        (4, {"source": CHECK + "assert x.sum() == 3"}, "a second check"),
    ],
)
def test_fault_in_equations_is_reported(chapter, index, fields, complaint):
    assert complaint in "\n".join(problems_in_equations(chapter(index, **fields)))


def test_numpy_and_numbers_are_float64(chapter):
    source = "# check: eq-double\nx = np.ones(3)\nassert x.sum() == 2 * 1.5"
    assert problems_in_equations(chapter(3, source=source)) == []


# --------------------------------------------------------------------------------- stored execution


def problems_in_execution(path):
    problems, code = [], [(i, c) for i, c in cells(path, "code") if c.source.strip()]
    if wrong := [(i, c, n) for n, (i, c) in enumerate(code, start=1) if c.execution_count != n]:
        i, cell, n = wrong[0]
        problems.append(
            f"{where(path, i)} has execution count {cell.execution_count}, not {n}: "
            "run the whole notebook"
        )
    for i, cell in code:
        tags, outputs, text = cell.metadata.get("tags", []), cell.outputs, "\n".join(texts(cell))
        faults = [
            (
                not nodes(cell),
                "is no plain Python: magics and shell lines do not run outside a notebook",
            ),
            (
                any(o.output_type == "error" for o in outputs),
                "ends in an error: mend it and run the notebook",
            ),
            (
                any(o.get("name") == "stderr" for o in outputs),
                "writes to stderr: silence its cause",
            ),
            ("Warning" in text, "shows a warning: remove its cause"),
            (
                images(cell) and any(o not in images(cell) for o in outputs),
                "has text and a figure: make two cells",
            ),
            (
                {*tags} - KNOWN_TAGS,
                f"has the tags {sorted({*tags} - KNOWN_TAGS)}: known are {sorted(KNOWN_TAGS)}",
            ),
            (
                re.search(r"(?i)nbval_|pytest_validate", re.sub(MARKER, "", cell.source)),
                "has a malformed or forbidden NBVAL marker: use the tag nbval-ignore-output",
            ),
            (
                ignored(cell) and "setup" not in tags and not asserts(cell),
                "is ignored by nbval: add an assert to it",
            ),
        ]
        problems += [f"{where(path, i)} {fault}" for wrong, fault in faults if wrong]
    for i, cell in enumerate(read(path).cells):
        if found := MACHINE_PATH.search("\n".join([cell.source, *texts(cell)])):
            problems.append(
                f"{where(path, i)} names a place on one machine ({found[0]}...): "
                "use a relative path"
            )
    if (share := sum(ignored(c) for _, c in code)) > 0.15 * len(code):
        problems.append(
            f"{path.name}: nbval ignores {share} of {len(code)} code cells, more than 15%: "
            "compare more"
        )
    if path.stat().st_size > 1_000_000:
        problems.append(
            f"{path.name}: {path.stat().st_size:,} bytes, more than 1,000,000: "
            "make its figures smaller"
        )
    return problems


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


@pytest.mark.parametrize(
    "index, fields, complaint",
    [
        (7, {"source": "%timeit double(2)"}, "no plain Python"),
        (7, {"execution_count": None}, "cell 7 has execution count None, not 5"),
        (7, {"execution_count": 9}, "cell 7 has execution count 9, not 5"),
        (
            7,
            {"outputs": [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]},
            "ends in an error",
        ),
        (7, {"outputs": [stream("4\n", "stderr")]}, "stderr"),
        (7, {"outputs": [stream("UserWarning: so so\n")]}, "shows a warning"),
        (7, {"outputs": [stream("see /home/ada/x.py\n")]}, "one machine"),
        (7, {"outputs": [stream(f"see {ROOT}/x.py\n")]}, "one machine"),
        (7, {"source": "open('C:\\\\Users\\\\ada')"}, "one machine"),
        (2, {"source": "Look into /tmp/x."}, "one machine"),
        (
            4,
            {
                "outputs": [
                    nbformat.v4.new_output("display_data", data={"image/png": ""}),
                    stream("4\n"),
                ]
            },
            "two cells",
        ),
        (7, {"metadata": {"tags": ["nbval-skip"]}}, "tags ['nbval-skip']"),
        (7, {"source": "print(4)  # NBVAL_IGNORE_OUTPUT"}, "malformed or forbidden"),
        (7, {"source": "# NBVAL_SKIP\nprint(4)"}, "malformed or forbidden"),
        (7, {"source": "# NBVAL_IGNORE_OUTPUT\nprint(4)"}, "add an assert"),
        (7, {"source": "# NBVAL_IGNORE_OUTPUT\nassert double(2) == 4"}, "more than 15%"),
        (7, {"outputs": [stream("4" * 1_000_000)]}, "more than 1,000,000"),
    ],
)
def test_fault_in_execution_is_reported(chapter, index, fields, complaint):
    assert complaint in "\n".join(problems_in_execution(chapter(index, **fields)))


# -------------------------------------------------------------------------- form, figures, markdown


def problems_in_form(path):
    problems, first = [], read(path).cells[0]
    lines = "\n".join(prose(c.source) for _, c in cells(path, "markdown")).splitlines()
    number = re.match(r"(\d\d)_", path.name)
    if (
        not number
        or first.cell_type != "markdown"
        or not re.match(rf"# {int(number[1])}\. \S", first.source)
    ):
        problems.append(
            f"{where(path, 0)}: the first line is not `# N. Title` with the number N of the file's "
            "name"
        )
    if sum(line.startswith("# ") for line in lines) != 1:
        problems.append(
            f"{path.name}: more or fewer than one title: use # once, ## and ### below it"
        )
    if "After this chapter you can" not in first.source:
        problems.append(f"{where(path, 0)}: no sentence that begins `After this chapter you can`")
    gains = any(c.source.startswith("# xvit_minimal/") for _, c in cells(path, "code"))
    found = [line.rstrip() for line in lines if line.rstrip() in HEADINGS]
    if found != HEADINGS and (gains or found != HEADINGS[1:]):
        problems.append(
            f"{path.name}: the chapter does not end with {HEADINGS}, each once and in this order"
        )
    exercises = re.findall(r"(?m)^\*\*Exercise (\d+)\b[^*\n]*\*\*", "\n".join(lines))
    solutions = [
        (m[1], c)
        for _, c in cells(path, "code")
        if (m := re.match(r"# Solution (\d+)\b", first_line(c)))
    ]
    if exercises not in (list("123"), list("1234"), list("12345")):
        problems.append(
            f"{path.name}: exercises {exercises}: number three to five from 1, as `**Exercise 1.**`"
        )
    if (solved := [k for k, _ in solutions]) != exercises:
        problems.append(
            f"{path.name}: solutions {solved}: begin one code cell for each exercise with "
            "`# Solution k`"
        )
    problems += [
        f"{path.name}: solution {k} is not folded: tag its cell hide-cell"
        for k, c in solutions
        if "hide-cell" not in c.metadata.get("tags", [])
    ]
    return problems


@pytest.mark.parametrize(
    "index, fields, complaint",
    [
        (0, {"source": "# 2. Double\n\nAfter this chapter you can double."}, "first line"),
        (0, {"source": "\n# 1. Double\n\nAfter this chapter you can double."}, "first line"),
        (0, {"source": "# 1. Double\n\nAfter it you can double."}, "After this chapter"),
        (5, {"source": "# What the package gained"}, "one title"),
        (5, {"source": "## Package"}, "does not end with"),
        (15, {"source": "## Summary"}, "does not end with"),
        (9, {"source": "**Exercise** 1. Double."}, "exercises ['2', '3']"),
        (10, {"source": "assert True"}, "solutions ['2', '3']"),
        (10, {"metadata": {"tags": []}}, "not folded"),
    ],
)
def test_fault_in_form_is_reported(chapter, index, fields, complaint):
    assert complaint in "\n".join(problems_in_form(chapter(index, **fields)))


def problems_in_figures(path):
    problems = []
    for i, cell in cells(path, "code"):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        empty = re.match(r"(?i)\s*(a |the )?(plot|figure|graph|image) (of|showing)", alt)
        if images(cell) and (len(alt) < 20 or empty):
            problems.append(
                f"{where(path, i)}: alt text {alt!r}: say in the cell's metadata, "
                "mystnb.image.alt, what is seen, in 20 characters or more"
            )
    return problems + [
        f"{where(path, i)}: an image without alt text: write ![what is seen](...)"
        for i, c in cells(path, "markdown")
        if re.search(r"!\[\s*\]", prose(c.source))
    ]


@pytest.mark.parametrize(
    "index, fields, complaint",
    [
        (4, {"metadata": {}}, "alt text ''"),
        (4, {"metadata": {"mystnb": {"image": {"alt": "A short one"}}}}, "20 characters"),
        (
            4,
            {"metadata": {"mystnb": {"image": {"alt": "Plot of the doubles of numbers"}}}},
            "what is seen",
        ),
        (2, {"source": "![](https://example.org/a.png)"}, "without alt text"),
    ],
)
def test_fault_in_figures_is_reported(chapter, index, fields, complaint):
    assert complaint in "\n".join(problems_in_figures(chapter(index, **fields)))


def problems_in_markdown(path):
    problems = []
    for i, cell in cells(path, "markdown"):
        spans = re.finditer(
            r"(?s)(\{[a-zA-Z][\w:+-]*\})?(?<!`)(`+)(?!`)(.+?)(?<!`)\2(?!`)", cell.source
        )
        text = prose(cell.source, keep_math=False)
        faults = [
            (
                re.search(r"(?m)^\s*(:::+|(```+|~~~+)\s*\{)|^\([\w-]+\)=\s*$", cell.source),
                "a MyST directive or target",
            ),
            (any(s[1] for s in spans), "a MyST role"),
            (re.search(r"<(?!https?:|mailto:)/?[A-Za-z][^>]*>|<!--", text), "HTML"),
            (re.search(r"\]\((?!https?://|#|mailto:)", text), "a link to another file"),
        ]
        problems += [
            f"{where(path, i)}: {fault}, which other viewers show raw or broken: use plain Markdown"
            for wrong, fault in faults
            if wrong
        ]
    return problems


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("::: {note}\nHello\n:::", "directive"),
        ("```{note}\nHello\n```", "directive"),
        ("(here)=\n## Here", "target"),
        ("By {eq}`eq-double`.", "role"),
        ("<div>Hello</div>", "HTML"),
        ("Hello<br/>", "HTML"),
        ("<!-- x -->", "HTML"),
        ("[next](02_next.ipynb)", "link to another file"),
        ("![cat](cat.png)", "link to another file"),
    ],
)
def test_fault_in_markdown_is_reported(chapter, source, complaint):
    assert complaint in "\n".join(problems_in_markdown(chapter(2, source=source)))


@pytest.mark.parametrize(
    "source",
    ["`{eq}` and `f{x}` and `<div>`", "$a<b$ and $c>d$", "<https://a.org> [b](https://b.org)"],
)
def test_code_and_mathematics_are_no_html(chapter, source):
    assert problems_in_markdown(chapter(2, source=source)) == []


# --------------------------------------------------------- a chapter without a fault, the real ones

CHECKS = [
    problems_in_equations,
    problems_in_execution,
    problems_in_form,
    problems_in_figures,
    problems_in_markdown,
]


@pytest.mark.parametrize("check", CHECKS)
def test_clean_chapter_has_no_problems(tree, check):
    assert check(tree / "book/part1/01_double.ipynb") == []


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter(check, path):
    if problems := check(path):
        pytest.fail("\n".join(problems), pytrace=False)
