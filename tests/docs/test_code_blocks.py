"""Everything the documentation shows is real: Python runs, commands exist, and output is what comes out.

What the word behind a fence's language means here:

* ``python``: run; a following ``output`` block is what it prints. The blocks of a page run in one process, in order.
* ``python file=name.py`` (or another language): written to that file; something later on the page has to use it.
* ``python part-of=name.py``: a piece of a file beside the page, but for its indentation; not run by itself.
* ``console``: lines that start with ``$``. Each command must exist, with these options.
* ``console run``: executed too, and the lines between the commands are what they print.
* ``console background``: a server, started before what follows and ended when the page ends.

In outputs ``...`` stands for anything. A page of examples/ runs in a copy of its directory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from zmqcore.matchmaker import open_matchmaker

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *EXAMPLES,
]
RUNNER = Path(__file__).with_name("run_page.py")

LIMIT_S = 240.0
"""How long a page may take before it is called stuck; a bound for a hang, not a promise about speed."""

LANGUAGES = {"python", "console", "output", "text", "toml", "json", "mermaid", "c", "ini"}
#: Programs other than our own that a page may tell the reader to run.
PROGRAMS = {
    *("cd", "chrt", "echo", "export", "git", "head", "jq", "kill", "ls", "pip", "python", "rm", "taskset"),
    "ulimit",
}


_FENCE = re.compile(r"(?P<indent> *)```(?P<info>.*)")


class Block(NamedTuple):
    """One fenced block: its language, the words behind that, its text, and the line of its fence."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int

    @property
    def file(self) -> str:
        """The file that this is to be written to."""
        return self._word("file=")

    @property
    def part_of(self) -> str:
        """The file, beside the page, that this is a piece of."""
        return self._word("part-of=")

    def _word(self, start: str) -> str:
        return next((word.removeprefix(start) for word in self.words if word.startswith(start)), "")

    def commands(self) -> Iterator[tuple[int, str, str]]:
        """Each command with its line and the output that is shown for it."""
        line, command, output = 0, "", []
        for number, text in enumerate(self.text.splitlines(), self.line + 1):
            if text.startswith("$ "):
                if command:
                    yield line, command, "\n".join(output)
                line, command, output = number, text[2:], []
            elif command.endswith("\\"):
                command = command[:-1] + text
            else:
                output.append(text)
        if command:
            yield line, command, "\n".join(output)


def blocks_of(page: Path) -> list[Block]:
    blocks = []
    fence: re.Match[str] | None = None
    line, lines = 0, list[str]()
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence is None:
            if fence := _FENCE.match(text):
                line, lines = number, []
        elif text.strip() == "```":
            language, *words = fence["info"].split() or [""]
            blocks.append(Block(language, tuple(words), "".join(f"{each}\n" for each in lines), line))
            fence = None
        else:
            # A block within a list is indented as its fence is.
            lines.append(text.removeprefix(fence["indent"]))
    assert fence is None, f"{page}:{line}: a block that does not end"
    return blocks


def steps_of(blocks: list[Block]) -> list[dict[str, object]]:
    steps: list[dict[str, object]] = []
    for block in blocks:
        if block.part_of:
            continue
        if block.file:
            steps.append(step("file", block.line, block.text, block.file))
        elif block.language == "python":
            steps.append(step("python", block.line, block.text))
        elif block.language == "output":
            assert steps, f"line {block.line}: output of nothing"
            assert steps[-1]["kind"] == "python", f"line {block.line}: output of no Python block"
            steps[-1]["output"] = block.text
        elif block.language == "console" and "background" in block.words:
            steps += [step("background", line, command) for line, command, _ in block.commands()]
        elif block.language == "console" and "run" in block.words:
            steps += [step("run", line, command, "", output) for line, command, output in block.commands()]
    return steps


def step(kind: str, line: int, code: str, file: str = "", output: str | None = None) -> dict[str, object]:
    return {"kind": kind, "line": line, "code": code, "file": file, "output": output}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Short: the path of an ipc socket is limited."""
    path = Path(tempfile.mkdtemp(prefix="zmqcore-docs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def environment(tmp_path: Path, runtime_dir: Path) -> dict[str, str]:
    """What a page's commands need: ``zmqcore`` and ``python`` are those of this run, and nothing is inherited."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in {"zmqcore": "-m zmqcore.cli", "python": ""}.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -W error {words} "$@"\n')
        program.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ZMQCORE_", "XDG_"))}
    return kept | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
        "ZMQCORE_RUNTIME_DIR": str(runtime_dir),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if steps_of(blocks_of(page))], ids=name_of)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    directory = tmp_path / "here"
    if page in EXAMPLES:
        shutil.copytree(page.parent, directory, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", str(RUNNER), name_of(page)],
        input=json.dumps(steps_of(blocks_of(page))),
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{name_of(page)} does not work:\n{done.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_known_kind_and_every_file_is_used(page: Path) -> None:
    blocks = blocks_of(page)
    for position, block in enumerate(blocks):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: say what this is: {', '.join(sorted(LANGUAGES))}"
        if block.language == "mermaid":
            assert ";" not in block.text, f"{where}: in a diagram a semicolon ends a statement"
        if block.file:
            stem = Path(block.file).stem
            used = any(
                stem in later.text
                and (later.language == "python" or {"run", "background"} & set(later.words))
                for later in blocks[position + 1 :]
            )
            assert used, f"{where}: nothing on the page uses {block.file}"
        elif block.part_of:
            whole = (page.parent / block.part_of).read_text(encoding="utf-8")
            indented = (textwrap.indent(block.text, " " * depth) for depth in (0, 4, 8, 12))
            assert any(f"\n{text}" in f"\n{whole}" for text in indented), f"{where}: not in {block.part_of}"
        else:
            assert set(block.words) <= {"run", "background"}, f"{where}: unknown words {block.words}"


@pytest.mark.parametrize("page", EXAMPLES, ids=name_of)
def test_every_program_of_an_example_is_linked_and_used(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    used = "\n".join(str(step["code"]) for step in steps_of(blocks_of(page)))
    sources = {path.name: path.read_text(encoding="utf-8") for path in page.parent.glob("*.py")}
    assert sources
    for name in sources:
        assert f"({name})" in text, f"{name_of(page)} does not link to {name}"
        module = Path(name).stem
        imported = any(
            re.search(rf"^(?:from|import) {module}\b", other, re.MULTILINE) for other in sources.values()
        )
        assert imported or re.search(rf"\b{module}\b", used), f"nothing in {name_of(page)} runs {name}"


def test_every_example_has_a_page() -> None:
    assert EXAMPLES
    directories = {path for path in (ROOT / "examples").iterdir() if path.is_dir()}
    assert directories == {page.parent for page in EXAMPLES}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "console":
            for line, command, _ in block.commands():
                problem = problem_with(command)
                assert not problem, f"{name_of(page)}:{line}: {problem}"


def problem_with(command: str) -> str:
    """Why a command line cannot be run as it stands; empty if it can. It is parsed, not run."""
    for part in re.split(r"\s(?:\||&&)\s", command):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        if not words:
            continue
        if words[0] == "make":
            targets = {word for word in words[1:] if "=" not in word}
            makefile = (ROOT / "Makefile").read_text()
            known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
            if targets - known:
                return f"the Makefile has no target {', '.join(targets - known)}"
        elif words[0] == "zmqcore":
            if problem := _problem_with_zmqcore(words[1:]):
                return problem
        elif words[0] not in PROGRAMS:
            return f"{words[0]} is no program that the documentation uses"
    return ""


def _problem_with_zmqcore(words: list[str]) -> str:
    if importlib.util.find_spec("click") is None:
        pytest.skip("the command line needs click")
    import click

    from zmqcore.cli.app import app

    if words in (["--help"], ["--version"]):
        return ""
    name = words[0] if words else ""
    found = app.commands.get(name)
    if found is None:
        return f"there is no command {name!r}"
    if words[1:] == ["--help"]:
        return ""
    try:
        found.make_context(name, words[1:])
    except click.ClickException as exc:
        return f"zmqcore {name}: {exc.format_message()}"
    return ""


REGISTRIES = [
    (page, block)
    for page in PAGES
    for block in blocks_of(page)
    if block.language == "toml" and "[[member]]" in block.text
]


@pytest.mark.parametrize(("page", "block"), REGISTRIES, ids=[f"{name_of(p)}:{b.line}" for p, b in REGISTRIES])
def test_a_registry_that_is_shown_can_be_read(page: Path, block: Block, tmp_path: Path) -> None:
    file = tmp_path / "members.toml"
    file.write_text(block.text)
    with open_matchmaker(f"static://{file}") as registry:
        assert registry.topics(), f"{name_of(page)}:{block.line} has no member"


@pytest.mark.parametrize(
    "command",
    [
        "zmqcore nonsense",
        "zmqcore call inventory stock --nonsense",
        "zmqcore call inventory",
        "zmqcore members | zmqcore nonsense",
        "make nonsense",
        "nonsense",
        "A=1 nonsense",
    ],
)
def test_a_command_that_does_not_exist_is_seen(command: str) -> None:
    assert problem_with(command)


@pytest.mark.parametrize(
    "steps",
    [
        [step("python", 1, "print('a')", output="b")],
        [step("python", 1, "1 / 0")],
        [step("python", 1, "import warnings; warnings.warn('old')")],
        [step("run", 1, "echo a", output="b")],
        [step("background", 1, "true")],
        [step("background", 1, "bash -c 'trap \"exit 3\" TERM; echo up; while :; do sleep 0.1; done'")],
    ],
)
def test_a_page_that_does_not_work_is_seen(
    steps: list[dict[str, object]], tmp_path: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(RUNNER), "page.md"],
        input=json.dumps(steps),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode != 0
