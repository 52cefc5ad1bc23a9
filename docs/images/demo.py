"""Draw ``demo.svg``: what a terminal shows at the end of a command. ``python demo.py COMMAND…`` runs it first."""

from __future__ import annotations

import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 96
_PIECES = re.compile(r"\x1b\[[^A-Za-z]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+")


def recorded(command: list[str]) -> str:
    """Run ``command`` in a terminal of its own and return all that it has written."""
    written = bytearray()

    def keep(fd: int) -> bytes:
        data = os.read(fd, 1 << 16)
        written.extend(data)
        return data

    os.environ.update(COLUMNS=str(WIDTH), TERM="xterm-256color")
    if pty.spawn(command, keep):
        raise SystemExit("the command has failed; nothing is drawn")
    return written.decode()


def final(output: str) -> str:
    """Return what is left on the screen: progress bars move the cursor up and erase lines."""
    lines, row = [""], 0
    for piece in _PIECES.findall(output):
        if piece == "\n":
            row += 1
            lines[row:] = lines[row:] or [""]
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece != "\r" and not piece.startswith("\x1b[?"):
            lines[row] += piece
    return "\n".join(lines)


def draw(command: str, screen: str) -> None:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text.from_ansi(screen.rstrip()))
    svg = console.export_svg(title="zmqcore", unique_id="demo")
    # A picture must not load anything from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL)
    Path(__file__).with_suffix(".svg").write_text(svg)


def main() -> None:
    command = sys.argv[1:]
    screen = final(recorded(command))
    draw(" ".join([Path(command[0]).name, *command[1:]]), screen)


if __name__ == "__main__":
    main()
