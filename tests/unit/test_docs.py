"""What the documents say is true: code runs and prints what is shown, links and names exist.

The ```python blocks of a page run in order, in one namespace. What a block prints has to stand in
a ```text block right below it. Two things that differ from run to run are not compared: durations,
and which rank was the first to report.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import crossdock
from crossdock import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERYTHING = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/*.md"))]

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
VARYING = re.compile(r"\b\d+\.\d\ss\b|\s+Reported\s+by\s+rank\s+\d+\.")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)|<img[^>]*\ssrc=\"(?P<image>[^\"]+)\"")
NUMBER = re.compile(r"\d+\.\d+")
HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)


class Example(NamedTuple):
    """A block of Python, padded so that its line numbers are the page's, and what it prints."""

    code: str
    shown: str


def examples_of(markdown: str) -> Iterator[Example]:
    fences = list(FENCE.finditer(markdown))
    for fence, below in itertools.zip_longest(fences, fences[1:]):
        if fence["language"] != "python":
            continue
        padding = "\n" * (markdown.count("\n", 0, fence.start()) + 1)
        follows = (
            below is not None
            and below["language"] in ("text", "output")
            and not markdown[fence.end() : below.start()].strip()
        )
        yield Example(padding + fence["text"], below["text"] if follows else "")


def comparable(text: str) -> str:
    return VARYING.sub("", text).rstrip()


def find_wrong_output(markdown: str, name: str) -> list[str]:
    """Run all examples; a finding for each that prints something else than is shown."""
    namespace: dict[str, object] = {"__name__": name}
    found = []
    for code, shown in examples_of(markdown):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), namespace)
        if comparable(printed.getvalue()) != comparable(shown):
            line = len(code) - len(code.lstrip("\n"))
            found.append(f"{name}:{line}: prints\n{printed.getvalue()}but shows\n{shown}")
    return found


def prose_of(markdown: str) -> str:
    return FENCE.sub("", markdown)


def anchors_of(markdown: str) -> set[str]:
    """The names by which headings are linked to."""
    texts = (heading["text"].lower() for heading in HEADING.finditer(prose_of(markdown)))
    return {re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-") for text in texts}


def find_broken_links(page: Path) -> list[str]:
    found = []
    for link in LINK.finditer(prose_of(page.read_text("utf-8"))):
        target = link["target"] or link["image"]
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        there = page.parent / path if path else page
        if not there.exists():
            found.append(f"{page.name}: {target}: no such file")
        elif anchor and anchor not in anchors_of(there.read_text("utf-8")):
            found.append(f"{page.name}: {target}: no such heading")
    return found


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        timeout=100,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_prints_what_is_shown(page: Path):
    report = "\n".join(find_wrong_output(page.read_text("utf-8"), page.name))
    assert not report, report


@pytest.mark.parametrize("page", EVERYTHING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert find_broken_links(page) == []


def test_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    named = re.findall(r"(?:\$ |`)make (\w+)", "".join(page.read_text("utf-8") for page in PAGES))
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_the_benchmark_has_its_place():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(re.findall("<!-- bench:begin -->.*?<!-- bench:end -->", readme, re.DOTALL)) == 1


def test_the_picture_shows_the_example():
    """Every number that the rows and sums of the picture name is one that the page prints."""
    picture = (ROOT / "docs" / "concepts.svg").read_text("utf-8")
    shown = re.findall(r">(?:gives|=) ([\d.]+)<", picture)
    page = (ROOT / "docs" / "concepts.md").read_text("utf-8")
    printed = {float(number) for _, text in examples_of(page) for number in NUMBER.findall(text)}
    assert len(shown) == 20
    assert {float(number) for number in shown} <= printed


def test_every_public_name_is_described():
    api = prose_of((ROOT / "docs" / "api.md").read_text("utf-8"))
    of_buffer = [name for name in dir(crossdock.Buffer) if not name.startswith("_")]
    names = set(crossdock.__all__) - set(errors.__all__) | set(of_buffer)
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", api)] == []


def test_every_error_is_described():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = {heading["text"] for heading in HEADING.finditer(prose_of(page))}
    assert set(errors.__all__) - {"CrossdockError"} <= headings


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SCRIPTS = [
    ("two_ranks", (), r"rank \d of 2: 4 rows came", 2),
    ("two_ranks", TORCHRUN, r"rank \d of 2: 4 rows came", 2),
    ("train_layer", (), r"loss 1\.\d+ -> 0\.\d+ in 60 steps", 1),
]


@pytest.mark.parametrize(
    ("script", "launcher", "line", "times"), SCRIPTS, ids=["two", "two-torchrun", "train"]
)
def test_an_example_runs(script: str, launcher: tuple[str, ...], line: str, times: int):
    told = run(*launcher, f"examples/{script}.py")
    assert len(set(re.findall(line, told))) == times, told


def test_every_example_is_run():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {script for script, *_ in SCRIPTS}


@pytest.mark.parametrize(
    "markdown",
    [
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nprint(1)\n```\nprose\n```text\n1\n```\n",
        "```python\npass\n```\n\n```text\n1\n```\n",
        "```python\nx = 1\n```\n```python\nprint(x)\n```\n```text\n2\n```\n",
        "```python\nprint('0.5 s, 3 rows')\n```\n```text\n0.7 s, 4 rows\n```\n",
    ],
)
def test_wrong_output_is_found(markdown: str):
    assert find_wrong_output(markdown, "page.md")


@pytest.mark.parametrize(
    "markdown",
    [
        "```python\nprint(1)\n```\n\n```text\n1\n```\n",
        "```python\nx = 1\n```\n```python\nprint(x)\n```\n```output\n1\n```\n",
        "```python\nprint('0.5 s')\n```\n```text\n0.7 s\n```\n",
        "```console\nmake\n```\n\n```text\n1\n```\n",
    ],
)
def test_right_output_passes(markdown: str):
    assert find_wrong_output(markdown, "page.md") == []


def test_an_error_names_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as raised:
        find_wrong_output("# A\n\n```python\nx = 1\nx / 0\n```\n", "page.md")
    assert raised.traceback[-1].lineno == 4  # counted from 0


@pytest.mark.parametrize("link", ["[a](gone.md)", "[a](#gone)", '<img alt="" src="gone.svg">'])
def test_a_broken_link_is_found(link: str, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# What there is: `this`\n[a](#what-there-is-this) [b](page.md) {link}\n")
    assert len(find_broken_links(page)) == 1
