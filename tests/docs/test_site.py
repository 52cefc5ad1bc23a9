"""The site builds without a warning, and its navigation has every page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import zmqcore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    built = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"),
            *("-c", str(ROOT / "docs"), "-d", str(built / "doctrees"), str(ROOT), str(built / "html")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return built / "html"


def test_every_page_is_on_it_and_in_its_navigation(site: Path) -> None:
    navigation = (site / "docs" / "index.html").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / "docs" / name).exists()
        assert f'class="reference internal" href="{name}"' in navigation or page.stem == "index", name


def test_every_public_name_is_documented(site: Path) -> None:
    pages = (site / "docs" / "reference" / "python").glob("*.html")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in zmqcore.__all__:
        assert name == "__version__" or re.search(rf'id="zmqcore\.(?:errors\.)?{name}"', text), name


def test_compiled_classes_are_documented(site: Path) -> None:
    core = (site / "docs" / "reference" / "python" / "core.html").read_text(encoding="utf-8")
    assert 'id="zmqcore._pool.ChannelPool.acquire"' in core
    assert "first come first served" in core
    text = re.sub(r"<[^>]+>", "", core)
    assert "acquire_open(endpoint: str) &#x2192; Channel | None" in text, "the signature is that of the stub"
    assert "close(timeout: float = 5.0) &#x2192; bool" in text, "also of what is inherited"
    assert not re.search(r"\b(?:double|bint|Py_ssize_t|size_t|uint64_t)\b", text), "no C"


def test_the_first_address_leads_to_the_first_page(site: Path) -> None:
    assert "url=docs/index.html" in (site / "index.html").read_text(encoding="utf-8")
