"""The built book: its pages are there, complete, and ask nothing of the outside.

`make book` runs this file with --site _build/html after it has built; without --site, planted
faults alone are tested.
"""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest
from conftest import ROOT

pytest.importorskip("bs4", reason="the tests read pages: pip install beautifulsoup4")
pytest.importorskip("yaml", reason="the book's contents are YAML: pip install pyyaml")
import yaml
from bs4 import BeautifulSoup

OUTSIDE = re.compile(r"(?:https?:)?//", re.I)
LOADED = {"src", "srcset", "poster", "data"}  # attributes that a browser follows without a click
LINKS = {
    "stylesheet",
    "preload",
    "modulepreload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "icon",
    "apple-touch-icon",
    "manifest",
}
IN_SCRIPT = (
    r"(?:(?:import|importScripts|fetch|Worker)\s*\(|\bfrom|\.src\s*=)\s*[\"'`](?:https?:)?//"
)
IN_STYLE = r"(?:url\(\s*[\"']?|@import\s+[\"'])(?:https?:)?//"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def pages(site):
    return sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)


def soup(page):
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def entries(root):
    """The files that _toc.yml names, without suffix."""
    toc = (root / "_toc.yml").read_text(encoding="utf-8")
    return re.findall(r"(?m)^\s*(?:-\s*)?(?:root|file):\s*[\"']?([^\s\"'#]+)", toc)


def problems_in_pages(site, root):
    return [
        f"{entry}.html is missing: look for its warning in the build's log"
        for entry in entries(root)
        if not (site / f"{entry}.html").is_file()
    ]


def problems_in_requests(site):
    """What a page loads by itself is a file of the site; no script names another place."""
    problems = []
    for page in pages(site):
        tree, name = soup(page), page.relative_to(site)
        loaded = [
            (tag.name, address)
            for tag in tree.find_all(True)
            for a in LOADED & {*tag.attrs}
            for address in (
                [part.split()[0] for part in tag[a].split(",")] if a == "srcset" else [tag[a]]
            )
        ]
        loaded += [
            ("link", tag["href"])
            for tag in tree.find_all("link", href=True)
            if LINKS & {*tag.get("rel", [])}
        ]
        for tag, address in loaded:
            file = (page.parent / unquote(re.split(r"[?#]", address)[0])).resolve()
            if OUTSIDE.match(address):
                problems.append(f"{name}: <{tag}> loads {address}: put the file into the site")
            elif not address.startswith(("data:", "blob:")) and not file.is_file():
                problems.append(f"{name}: <{tag}> loads {address}, which is not in the site")
        for tag in tree.find_all("meta", attrs={"http-equiv": re.compile("refresh", re.I)}):
            if OUTSIDE.search(tag.get("content", "")):
                problems.append(f"{name}: leads to {tag['content']} by itself: stay in the site")
        scripts = "\n".join(tag.text for tag in tree.find_all("script", src=False))
        addresses = {*re.findall(r"(?:https?:)?//[\w-]+(?:\.[\w-]+)+[^\s\"'`]*", scripts)}
        problems += [
            f"{name}: an inline script names {address}: configure its extension away"
            for address in sorted(addresses)
            if "//www.w3.org/" not in address
        ]
        styles = "\n".join(
            [t.text for t in tree.find_all("style")]
            + [t["style"] for t in tree.find_all(style=True)]
        )
        problems += [
            f"{name}: a style loads from the outside: {found}..."
            for found in re.findall(IN_STYLE, styles)
        ]
    for pattern, suffix in ((IN_STYLE, "*.css"), (IN_SCRIPT, "*.js")):
        for file in sorted(site.rglob(suffix)):
            if found := re.search(pattern, file.read_text(encoding="utf-8", errors="replace")):
                problems.append(
                    f"{file.relative_to(site)}: loads from the outside, {found[0]}...: bring it in"
                )
    return problems


def problems_in_colab_links(site, root):
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    owner_and_name = repository["url"].removeprefix("https://github.com/").strip("/")
    ours = f"https://colab.research.google.com/github/{owner_and_name}"
    problems = []
    for page in pages(site):
        own = page.relative_to(site).with_suffix(".ipynb").as_posix()
        found = [
            a["href"]
            for a in soup(page).find_all("a", href=re.compile("colab.research.google.com"))
        ]
        wanted = f"{ours}/blob/{repository['branch']}/{own}"
        if (root / own).is_file() and wanted not in found:
            problems.append(
                f"{page.relative_to(site)}: no link to {wanted}: see launch_buttons in _config.yml"
            )
        for link in found:
            start, _, file = link.partition(f"/blob/{repository['branch']}/")
            there = (root / unquote(file)).is_file()
            if start != ours or not there:
                problems.append(
                    f"{page.relative_to(site)}: {link} is no notebook of the repository that "
                    "_config.yml names"
                )
    return problems


def problems_in_text(site):
    """Nothing is left unresolved, and no file's name has become a stranger's address."""
    problems = []
    for page in pages(site):
        tree, name = soup(page), page.relative_to(site)
        for tag in tree.find_all(
            "a", href=re.compile(r"^https?://[\w.-]+\.(py|md|sh|ipynb|yml|json)/?$")
        ):
            problems.append(
                f"{name}: {tag.text} became a link to {tag['href']}: "
                "set myst_linkify_fuzzy_links to false"
            )
        dead = [tag for tag in tree.select("span.xref.myst") if not tag.find_parent("a", href=True)]
        if dead or tree.select(".system-message, .problematic, .xref.broken"):
            problems.append(
                f"{name}: an unresolved reference or an error of the build: see the build's log"
            )
        for tag in tree.find_all(["script", "style", "pre", "code"]):
            tag.decompose()
        if found := re.search(r"\[\?\]|\?\?", tree.get_text(" ")):
            problems.append(f"{name}: {found[0]} where a reference should stand: correct its label")
    return problems


def problems_in_mathematics(site):
    """A page with mathematics loads MathJax from the site."""
    problems = []
    for page in pages(site):
        tree = soup(page)
        sources = [
            s["src"].split("?")[0] for s in tree.find_all("script", src=re.compile("mathjax", re.I))
        ]
        local = [s for s in sources if not OUTSIDE.match(s) and (page.parent / s).is_file()]
        if tree.select(".math") and not local:
            problems.append(
                f"{page.relative_to(site)}: no MathJax of the site's own typesets it "
                f"(scripts: {sources})"
            )
    return problems


def problems_in_browser(page, folder):
    """Open a page with the network off: what it asks for, and the mathematics left as text."""
    log = folder / "net.json"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-component-update",
        "--disable-background-networking",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--log-net-log={log}",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        page.resolve().as_uri(),
    ]
    dom = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=True
    ).stdout
    events = [e.get("params", {}) for e in json.loads(log.read_text(encoding="utf-8"))["events"]]
    asked = {
        e["url"]
        for e in events
        if OUTSIDE.match(e.get("url", ""))
        and e.get("initiator", "not an origin") != "not an origin"
    }  # as of the browser's own requests
    problems = [
        f"{page.name}: asks for {url} when opened: put it into the site" for url in sorted(asked)
    ]
    tree = BeautifulSoup(dom, "html.parser")
    problems += [
        f"{page.name}: not typeset: {math.get_text()[:60]!r}"
        for math in tree.select(".math")
        if not math.find("mjx-container") or re.search(r"\\[\[(]", math.get_text())
    ]
    problems += [
        f"{page.name}: MathJax reports {e.get('data-mjx-error')!r}"
        for e in tree.select("[data-mjx-error]")
    ]
    for tag in tree.find_all(["script", "style", "pre", "code"]):
        tag.decompose()
    return problems + (
        [f"{page.name}: $$ is shown as text: a display is malformed"]
        if "$$" in tree.get_text()
        else []
    )


# ----------------------------------------------------------------------- planted faults, clean site

COLAB = "https://colab.research.google.com/github/-nobody/tiny/blob/v1/book/part1/01_double.ipynb"
CHAPTER = f"""<html><head><link rel="stylesheet" href="../../a.css?v=1">
<link rel="canonical" href="https://example.org"><script src="../../mathjax/tex.js"></script></head>
<body><a href="https://arxiv.org">paper</a> <code>x??</code> <a href="{COLAB}">Colab</a>
<span class="math">\\(x\\)</span></body></html>"""


@pytest.fixture
def tiny(tree):
    """A built site without faults, of the tiny repository."""
    built = tree / "_build/html"
    files = {
        "book/part1/01_double.html": CHAPTER,
        "book/index.html": "<p>Hello",
        "book/references.html": "<p>Hello",
        "a.css": "p {background: url(a.png)}",
        "mathjax/tex.js": "let a = 'https://example.org';",
    }
    for name, text in files.items():
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        (built / name).write_text(text, encoding="utf-8")
    return built


def all_problems(site, root):
    return (
        problems_in_pages(site, root)
        + problems_in_requests(site)
        + problems_in_colab_links(site, root)
        + problems_in_text(site)
        + problems_in_mathematics(site)
    )


def test_clean_site_has_no_problems(tiny, tree):
    assert all_problems(tiny, tree) == []


@pytest.mark.parametrize(
    "file, old, new, complaint",
    [
        ("_toc.yml", "part1/01_double", "gone", "book/gone.html is missing"),
        *[
            ("book/index.html", "Hello", text, "loads")
            for text in (
                '<script src="https://unpkg.com/a.js"></script>',
                '<img src="//example.org/a.png">',
                '<img src="gone.png">',
                '<link rel="preconnect" href="https://fonts.example.org">',
                '<iframe src="https://example.org"></iframe>',
                '<link rel="icon" href="https://example.org/a.ico">',
                '<p style="background: url(https://example.org/a.png)">',
                '<img srcset="https://example.org/a.png 2x">',
                "<style>@import 'https://example.org/a.css';</style>",
            )
        ],
        (
            "book/index.html",
            "Hello",
            '<script>const URL = "https://unpkg.com/thebe"</script>',
            "an inline script names",
        ),
        (
            "book/index.html",
            "Hello",
            '<meta http-equiv="Refresh" content="0; url=https://example.org">',
            "leads to",
        ),
        (
            "a.css",
            "url(a.png)",
            "url('https://example.org/a.png')",
            "a.css: loads from the outside",
        ),
        ("mathjax/tex.js", "let a =", "let s = {}; s.src =", "tex.js: loads from the outside"),
        (
            "mathjax/tex.js",
            "let a = ",
            "import('https://example.org/a.js'); let a = ",
            "tex.js: loads from the outside",
        ),
        ("book/part1/01_double.html", "blob/v1", "blob/main", "no notebook of"),
        ("book/part1/01_double.html", "-nobody", "somebody", "no notebook of"),
        ("book/part1/01_double.html", "01_double.ipynb", "02_gone.ipynb", "no notebook of"),
        ("book/part1/01_double.html", "https://colab.research.google.com", "", "no link to"),
        ("book/index.html", "Hello", "as in [?]", "where a reference should stand"),
        ("book/index.html", "Hello", "Equation (??)", "where a reference should stand"),
        (
            "book/index.html",
            "Hello",
            '<span class="xref myst">eq-gone</span>',
            "an unresolved reference",
        ),
        (
            "book/index.html",
            "Hello",
            '<a href="http://attention.py">attention.py</a>',
            "became a link",
        ),
        (
            "book/part1/01_double.html",
            "../../mathjax/tex.js",
            "https://cdn.example.org/mathjax.js",
            "no MathJax",
        ),
        ("book/part1/01_double.html", "mathjax/tex.js", "mathjax/gone.js", "no MathJax"),
    ],
)
def test_fault_in_a_site_is_reported(tiny, tree, file, old, new, complaint):
    path = (tree if file == "_toc.yml" else tiny) / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert complaint in "\n".join(all_problems(tiny, tree))


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome here: install one to open the pages"
)


@needs_browser
def test_fault_in_the_browser_is_reported(tiny, tmp_path):
    page = tiny / "book/index.html"
    page.write_text(
        "<p>$$ x $$ <span class='math'>\\(y\\)</span><script>setTimeout(() => {"
        "const s = new Image(); s.src = 'https:' + '//cdn.example.org/late.png'}, 100)</script>",
        encoding="utf-8",
    )
    problems = "\n".join(problems_in_browser(page, tmp_path))
    assert all(
        word in problems
        for word in ("asks for https://cdn.example.org/late.png", "not typeset", "$$ is shown")
    )


# ------------------------------------------------------------------------------------ the real site


@pytest.mark.parametrize(
    "check",
    [
        lambda s: problems_in_pages(s, ROOT),
        problems_in_requests,
        problems_in_text,
        lambda s: problems_in_colab_links(s, ROOT),
        problems_in_mathematics,
    ],
    ids=["pages", "requests", "text", "colab_links", "mathematics"],
)
def test_site(site, check):
    if problems := check(site):
        pytest.fail("\n".join(problems), pytrace=False)


@needs_browser
@pytest.mark.parametrize(
    "which", [0, -1], ids=["first page with mathematics", "last page with mathematics"]
)
def test_site_in_a_browser(site, which, tmp_path):
    page = [p for p in pages(site) if soup(p).select(".math")][which]
    if problems := problems_in_browser(page, tmp_path):
        pytest.fail("\n".join(problems), pytrace=False)
