"""The command line: ``zmqcore demo | serve | call | cast | fanout | members | ping | stats | doctor | bench``.

It needs click and rich, which only ``zmqcore[cli]`` installs. Without them an import ends the process with
one line that says so (exit code 1), because the import is all that the installed ``zmqcore`` script does
first.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import NoReturn

__all__ = ["main"]

# Looked for, not imported: the demo's worker processes import this package and need neither of the two.
if find_spec("click") is None or find_spec("rich") is None:
    raise SystemExit("zmqcore: the command line needs click and rich: pip install 'zmqcore[cli]'")


def main() -> NoReturn:
    """Run the command line with ``sys.argv`` and exit with its code (see ``zmqcore --help``).

    Raises:
        SystemExit: always.
    """
    try:
        from zmqcore.cli.app import run  # noqa: PLC0415 - click and rich are an optional extra

        sys.exit(run())
    except KeyboardInterrupt:
        # Ctrl-C while modules are being imported; run() itself handles what comes later.
        sys.exit(130)
