"""What is shipped: all sources in the sdist, stubs and declarations in the wheel, generated C in neither."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("zmqcore", "tests", "bench", "docs", "examples", ".ci")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", "README.md", "CHANGELOG.md")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as packaging writes beside them; with the generated C, to save generating it."""
    copy = tmp_path_factory.mktemp("sdist") / "tree"
    junk = shutil.ignore_patterns("__pycache__", "*.so", ".*")
    for name in (*SHIPPED, "build/cython"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=junk)
    for name in (*FILES, "CONTRIBUTING.md"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy / name)
    # What must not get in: something generated, something compiled, something cached.
    for name in (
        "zmqcore/_frame.c",
        "zmqcore/_frame.so",
        "zmqcore/__pycache__/x.pyc",
        "tests/__pycache__/x.pyc",
        "bench/.mypy_cache/3.11/x.json",
        "tests/unit/.hypothesis/x",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"")
    return copy


def package_files(*suffixes: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "zmqcore").rglob("*")
        if path.suffix in suffixes or path.name == "py.typed"
    }


def run_setup(tree: Path, *command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ZMQCORE_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_sdist_has_every_source_and_nothing_generated(tree: Path, tmp_path: Path) -> None:
    run_setup(tree, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("zmqcore-*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    assert package_files(".py", ".pyx", ".pxd", ".pyi") <= files
    assert set(FILES) <= files
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")} <= files
    ours_by_hand = {name for name in files if name.startswith("bench/") and name.endswith(".c")}
    generated = {name for name in files if name.endswith((".c", ".so", ".pyc", ".o"))} - ours_by_hand
    assert generated == set()
    tools = {str(path.relative_to(ROOT)) for path in (ROOT / ".ci").iterdir() if path.is_file()}
    assert tools <= files
    assert [name for name in files - tools if name.startswith(("build/", ".")) or "/." in name] == []


def test_wheel_has_stubs_and_declarations_and_no_source_of_compiled_modules(
    tree: Path, tmp_path: Path
) -> None:
    run_setup(tree, "build_py", "--build-lib", str(tmp_path))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == package_files(".py", ".pxd", ".pyi")
