"""The commands together, and the one place where an exception becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from zmqcore import __version__
from zmqcore.cli.bench.command import bench
from zmqcore.cli.calling import call, cast, fanout
from zmqcore.cli.demo.command import demo
from zmqcore.cli.doctor import doctor
from zmqcore.cli.members import members
from zmqcore.cli.outcome import EXIT_CODES_HELP, Exit, status_of
from zmqcore.cli.output import note, show_error
from zmqcore.cli.ping import ping
from zmqcore.cli.serving import serve
from zmqcore.cli.stats import stats

__all__ = ["app", "run"]


class _InOrder(click.Group):
    """A group that lists its commands as a newcomer needs them, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which they were added."""
        del ctx
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=f"""Brokerless RPC over ZeroMQ: call methods of servers that find each other, with no broker to run.

\b
Try it:
    zmqcore demo                                   see it work, in half a minute
    zmqcore serve statistics --topic stats         serve a module's functions
    zmqcore call stats mean '[1, 2, 6]'            from another terminal
    zmqcore members                                who serves what
    zmqcore doctor                                 is everything as it should be?
    zmqcore bench                                  how fast is it here?

Results go to standard output (JSON unless it is a terminal), errors and hints to standard error.

{EXIT_CODES_HELP}""",
)
@click.version_option(__version__, prog_name="zmqcore")
def app() -> None:
    """Group the commands."""


for _command in (demo, serve, call, cast, fanout, members, ping, stats, doctor, bench):
    app.add_command(_command)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line *args* (``sys.argv`` if None) and return the exit code; errors are printed."""
    try:
        with app.make_context("zmqcore", list(sys.argv[1:] if args is None else args)) as ctx:
            status = app.invoke(ctx)
            return int(status or Exit.OK)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (KeyboardInterrupt, click.Abort):
        note("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does. Nothing may be written at exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except OSError as exc:
        show_error(exc)
        return status_of(exc)
    except Exception as exc:  # noqa: BLE001 - a fault of ours must not look like a remote error
        traceback.print_exception(exc)
        note("this is a fault of zmqcore: please report it with the output of `zmqcore doctor --json`")
        return Exit.INTERNAL
