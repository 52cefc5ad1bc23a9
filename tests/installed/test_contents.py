"""What the wheel has put into the environment: all that is needed to run and to check types, and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import Distribution, entry_points
from pathlib import Path

import pytest

import zmqcore

PACKAGE = Path(zmqcore.__file__ or "").parent


def test_is_imported_from_where_packages_are_installed(installed: Distribution) -> None:
    assert installed.version == zmqcore.__version__
    assert PACKAGE.parent in {Path(sysconfig.get_path(name)).resolve() for name in ("platlib", "purelib")}


@pytest.mark.usefixtures("installed")
def test_every_module_can_be_imported() -> None:
    names = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "zmqcore.")]
    assert {"zmqcore._channel", "zmqcore.rpc.server", "zmqcore.matchmaker.local", "zmqcore.cli.app"} <= set(
        names
    )
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


@pytest.mark.usefixtures("installed")
def test_has_a_stub_for_each_compiled_module_and_no_source_of_one() -> None:
    compiled = {
        path.name.partition(".")[0]
        for path in PACKAGE.rglob("*")
        if path.name.endswith(tuple(EXTENSION_SUFFIXES))
    }
    assert {"_libzmq", "_frame", "_socket", "_channel", "_pool", "_port"} <= compiled
    assert {path.stem for path in PACKAGE.rglob("*.pyi")} == compiled
    assert (PACKAGE / "py.typed").is_file()
    assert [path.name for path in PACKAGE.rglob("*") if path.suffix in (".pyx", ".c", ".cpp", ".h")] == []


def test_puts_nothing_beside_the_package(installed: Distribution) -> None:
    """No ``tests`` or ``bench`` that would take these names from the user."""
    tops = {file.parts[0] for file in installed.files or [] if file.parts[0] != ".."}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zmqcore"}


def test_carries_licence_and_command(installed: Distribution) -> None:
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    assert any(file.name == "LICENSE" for file in installed.files or [])
    (command,) = entry_points(group="console_scripts", name="zmqcore")
    assert command.value == "zmqcore.cli:main"
