"""What the demo computes, and on what: one function for the workers and for the check without RPC."""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Analysis", "analyse", "standard_library"]

# Not part of the standard library although they lie in its directory.
_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is found in one Python source file.

    ``digest`` is a keyed BLAKE2b over the text of all tokens, so it can be right only if the whole file
    arrived, was tokenized, and the key had been configured. ``error`` names the exception of a file that is
    not valid Python (the standard library tests itself with some); ``tokens`` is then how many there were
    before it.
    """

    tokens: int
    lines: int
    digest: str
    error: str | None

    def as_message(self) -> dict[str, Any]:
        """Return it in types that a codec can pack."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Analysis:
        """Return what :meth:`as_message` was made from; keys that are not ours are left alone.

        Raises:
            KeyError: a part is missing.
        """
        return cls(message["tokens"], message["lines"], message["digest"], message["error"])


def analyse(source: bytes | bytearray | memoryview, key: bytes) -> Analysis:
    """Tokenize *source*; return counts and a digest with *key* (1 to 64 bytes). Bad source does not raise."""
    data = bytes(source)
    texts: list[str] = []
    error: str | None = None
    try:
        texts.extend(token.string for token in tokenize.tokenize(io.BytesIO(data).readline))
    except Exception as exc:  # noqa: BLE001 - whatever the tokenizer makes of a broken file is the result
        error = type(exc).__name__
    digest = hashlib.blake2b(key=key, digest_size=16)
    digest.update(b"\0".join(text.encode("utf-8", "surrogatepass") for text in texts))
    # Over the bytes too: white space and what follows an error are in no token.
    digest.update(data)
    return Analysis(len(texts), data.count(b"\n"), digest.hexdigest(), error)


def standard_library(root: Path | None = None) -> list[Path]:
    """Return every ``.py`` file of the running Python's standard library (or below *root*), sorted."""
    top = Path(sysconfig.get_path("stdlib")) if root is None else root
    found: list[Path] = []
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = [name for name in subdirectories if name not in _FOREIGN]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(path for path in found if path.is_file() and os.access(path, os.R_OK))
