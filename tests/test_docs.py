"""The pages say what is so: generated ones are fresh, links lead somewhere, examples run, commands exist."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch

from fedscan.methods.registry import methods
from fedscan.models.registry import models
from fedscan.run import Problem
from fedscan.studyfile import load

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """What a forge makes of the headings."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(page: Path) -> Iterator[str]:
    """Links to what is not there: files, folders, headings."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield link


def test_generated_pages_are_fresh() -> None:
    made = subprocess.run([sys.executable, ROOT / "docs" / "make.py", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def test_every_method_model_and_command_has_its_section() -> None:
    assert {name for name, e in methods().items() if e.package == "fedscan"} <= anchors(text_of("docs/methods.md"))
    assert set(models()) <= anchors(text_of("docs/models.md"))
    commands = {f"fedscan-{name.replace(' ', '-')}" for name in known_commands()}
    assert commands <= anchors(text_of("docs/commands.md"))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(dead_links(page))


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = ROOT / "docs" / "guide.md"
    assert "#nowhere" not in page.read_text()
    for link in ("gone.md", "#nowhere", "study.md#nowhere"):
        copy = tmp_path / "page.md"
        copy.write_text(f"[x]({link})")
        assert list(dead_links(copy)) == [link]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "python")], ids=lambda p: p.name)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), "python"), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)  # our own pages, in a test


STUDIES = [
    (page.name, n, text)
    for page in PAGES
    for n, text in enumerate(blocks(page.read_text(encoding="utf-8"), "toml"))
    if "[project." not in text
]


@pytest.mark.parametrize("text", [t for *_, t in STUDIES], ids=[f"{page}-{n}" for page, n, _ in STUDIES])
def test_study_examples_are_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(text)
    assert load(tmp_path / "study.toml").hash


def test_the_mistake_in_the_guide_is_named_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = text_of("docs/guide.md")
    study = next(b for b in blocks(guide, "toml") if 'preset = "small"' in b)
    monkeypatch.chdir(tmp_path)
    Path("study.toml").write_text(study.replace('"small"', '"smal"'))
    with pytest.raises(Problem) as said:
        load("study.toml")
    assert f"{said.value}\n" in blocks(guide, "text")


def known_commands() -> dict[str, set[str]]:
    """Every command and the options it takes."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make
    finally:
        sys.path.pop(0)
    import inspect

    from fedscan.cli.commands import app

    found = {}
    for name, function in make.commands(app):
        written = [make.written(p)[0] for p in inspect.signature(function, eval_str=True).parameters.values()]
        found[name] = {word for option in written for word in re.findall(r"(?<!\S)-{1,2}[a-z][a-z-]*", option)}
    return found


def test_commands_in_pages_exist() -> None:
    known = known_commands()
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        inline = [m for m in re.findall(r"`(fedscan [^`]+)`", prose(text)) if "COMMAND" not in m]
        lines = [line for block in blocks(text, "sh") for line in block.splitlines() if line.startswith("fedscan ")]
        for line in [*inline, *lines]:
            words = shlex.split(line)[1:]
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
            if name is None:
                assert words[0] in ("--help", "--version"), f"{page.name}: {line}"
                continue
            for word in words:
                assert not word.startswith("-") or word in known[name] | {"--help"}, f"{page.name}: {line}"
            seen += 1
    assert seen > 10


def test_tests_that_pages_name_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", page.read_text())}
    assert len(named) > 40
    for name in named:
        path, test = name.split("::")
        assert re.search(rf"^def {test}\(", text_of(path), re.M), name


def test_each_threat_is_held_by_a_test_or_said_not_to_be_covered() -> None:
    rows = re.findall(r"^\| T(\d+) \|(.*?)\|(.*?)\|(.*?)\|$", text_of("docs/threats.md"), re.M)
    assert sorted(int(number) for number, *_ in rows) == list(range(1, 41))
    for number, _, stops, test in rows:
        admitted = any(said in stops.lower() for said in ("not covered", "does not arise"))
        assert "::" in test or admitted, f"T{number}"


@every_page
def test_no_path_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|opt)/\S*|[A-Z]:\\\S+", text)


@every_page
def test_tables_are_whole(page: Path) -> None:
    for lines in re.findall(r"(?:^\|.*\|\n)+", prose(page.read_text(encoding="utf-8") + "\n"), re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}
        assert len(widths) == 1, lines


def test_readme_has_two_set_up_commands() -> None:
    start = re.search(r"^## Start$(.*?)^## ", text_of("README.md"), re.S | re.M)
    assert start
    assert [line for block in blocks(start[1], "sh") for line in block.splitlines()] == ["make demo", "make test"]
    targets = re.findall(r"^([a-z]+):", text_of("Makefile"), re.M)
    assert {"demo", "test", "check", "bench", "docs"} <= set(targets)
    assert "not a medical device" in text_of("README.md")


def test_a_figure_has_its_command_machine_and_spread() -> None:
    for lines in re.findall(r"(?:^\|.*\|\n)+", text_of("docs/benchmarks.md"), re.M):
        head, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines.splitlines())
        if "measured" not in head:
            continue
        for row in rows:
            told = dict(zip(head, row, strict=True))
            if told["measured"] != "not measured":
                assert all(told[what] for what in ("spread", "machine", "command")), row


def floors() -> dict[str, int]:
    """How high each module or package of fedscan stands, as docs/architecture.md has it; 0 is the ground."""
    rows = re.search(r"^## Floors$.*?((?:^\|.*\|\n)+)", text_of("docs/architecture.md"), re.S | re.M)
    assert rows
    found = [re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", line)) for line in rows[1].splitlines()[2:]]
    return {name: height for height, names in enumerate(reversed(found)) for name in names}


def imported(path: Path) -> Iterator[str]:
    """The modules and packages of fedscan that a file imports, at its head or inside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fedscan":
            inner = node.module.split(".")[1:2]
            yield from inner or [alias.name for alias in node.names if not alias.name.startswith("__")]


def test_the_floors_are_those_of_the_code() -> None:
    package, height = ROOT / "src" / "fedscan", floors()
    rooms = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert rooms - {"__init__"} <= set(height)
    graph: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for other in imported(path) if room != "__init__" else ():
            assert height[other] <= height[room], f"{path.name} of {room} imports {other}, which stands above it"
            graph.setdefault(room, set()).update({other} - {room})
    TopologicalSorter(graph).prepare()  # raises where imports run in a circle
