"""The command members: who serves what, as the matchmaker has it."""

from __future__ import annotations

import click

from zmqcore import Topic, errors
from zmqcore.cli.options import Command, exchange_option, json_option, matchmaker_option, server_option
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import Output, member_json
from zmqcore.matchmaker import Matchmaker, Member, open_matchmaker

__all__ = ["members"]


def _registered(registry: Matchmaker, topic: Topic | None) -> list[Member]:
    topics = registry.topics() if topic is None else [topic]
    return [member for each in topics for member in registry.members(each).members]


def _row(member: Member) -> list[str]:
    topic = member.topic
    return [
        f"{topic.name} ({topic.exchange})" if topic.exchange else topic.name,
        topic.server or "",
        member.host,
        str(member.pid),
        "  ".join(member.endpoints),
    ]


@click.command(
    cls=Command,
    short_help="List who serves what.",
    help=f"""List the members of TOPIC, or of every topic.

It asks the matchmaker only: a member that is listed holds a lease, whether it answers is what ping tells.
Exit code 3 if TOPIC is given and nobody serves it.

\b
Examples:
    zmqcore members
    zmqcore members inventory --json | jq -r '.[].endpoints[]'
    zmqcore members inventory --matchmaker static:///etc/zmqcore/members.toml

{exit_codes_help(Exit.NOBODY_THERE)}""",
)
@click.argument("topic", required=False)
@server_option
@exchange_option
@matchmaker_option
@json_option
def members(
    topic: str | None, server: str | None, exchange: str, matchmaker: str, json_wanted: bool | None
) -> int:
    """Run ``zmqcore members``."""
    if topic is None and (server or exchange):
        raise click.UsageError("--server and --exchange choose among the members of a TOPIC: name it")
    wanted = None if topic is None else Topic(topic, server=server or None, exchange=exchange)
    with open_matchmaker(matchmaker) as registry:
        found = _registered(registry, wanted)
    output = Output(json_wanted)
    if output.machine:
        output.json([member_json(member) for member in found])
    elif found:
        output.table(
            f"members of {topic}" if topic else "members",
            {"topic": "left", "server": "left", "host": "left", "pid": "right", "endpoints": "left"},
            map(_row, found),
        )
    elif wanted is None:
        output.line("nobody serves anything here")
    if wanted is not None and not found:
        raise errors.NoSuchTopic(f"nobody serves topic {str(wanted)!r}, says {registry.url}")
    return Exit.OK
