"""Draw the diagrams of the pages for the site, which shows pictures: ``python docs/images/diagrams.py``.

Diagrams are written as Mermaid, which the host of the repository draws by itself. A site would have to load a script of
megabytes from elsewhere for that; so each one is drawn once, into ``diagrams/``, under a name that depends on its text.
Needs npx (Node.js) and Chromium. Pictures of diagrams that no page has any more are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parents[1]
PICTURES = Path(__file__).with_name("diagrams")

_DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAM = ("npx", "--yes", "-p", "@mermaid-js/mermaid-cli@11", "mmdc")
# Text, not HTML within the picture: not every program that shows an SVG can show that.
_CONFIG = {"theme": "neutral", "htmlLabels": False, "deterministicIds": True, "fontFamily": "sans-serif"}


def picture_of(page: Path, diagram: str) -> Path:
    """Return where the picture of a diagram of ``page`` is, or is to be."""
    digest = hashlib.sha256(diagram.strip().encode()).hexdigest()[:10]
    return PICTURES / f"{page.stem}-{digest}.svg"


def diagrams() -> Iterator[tuple[Path, str]]:
    """Yield each diagram with its page."""
    for page in sorted(DOCS.rglob("*.md")):
        for diagram in _DIAGRAM.findall(page.read_text(encoding="utf-8")):
            yield page, diagram


def draw(diagram: str, picture: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is needed to draw diagrams, and there is none on the PATH")
    with tempfile.TemporaryDirectory() as directory:
        source, config, browser = (Path(directory, name) for name in ("d.mmd", "config.json", "browser.json"))
        source.write_text(diagram, encoding="utf-8")
        config.write_text(json.dumps(_CONFIG))
        browser.write_text(json.dumps({"executablePath": chromium, "args": ["--no-sandbox"]}))
        words = ["-q", "-b", "white", "-c", config, "-p", browser, "-i", source, "-o", picture]
        environment = os.environ | {"PUPPETEER_SKIP_DOWNLOAD": "1"}
        subprocess.run([*_PROGRAM, *words], check=True, env=environment)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    wanted = {picture_of(page, diagram): diagram for page, diagram in diagrams()}
    for picture in set(PICTURES.iterdir()) - set(wanted):
        picture.unlink()
    for picture, diagram in wanted.items():
        if not picture.exists():
            draw(diagram, picture)
            print(f"{picture.name} is drawn")


if __name__ == "__main__":
    main()
