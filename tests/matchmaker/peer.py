"""A process of its own for the tests: ``peer.py URL SERVER [TTL [COUNT]]``.

Registers COUNT members, says "ready", then obeys its stdin: "close" gives up the leases and says so, "who"
says which servers it sees, end of file ends it without giving anything up.
"""

from __future__ import annotations

import os
import sys

from zmqcore.matchmaker import Member, open_matchmaker
from zmqcore.topic import Topic


def main(url: str, server: str, ttl: str = "10", count: str = "1") -> None:
    matchmaker = open_matchmaker(url)
    leases = []
    for number in range(int(count)):
        name = server if count == "1" else f"{server}-{number}"
        member = Member(
            Topic("inventory", name), ("tcp://127.0.0.1:5555",), f"{os.getpid()}", "host", os.getpid()
        )
        leases.append(matchmaker.register(member, float(ttl)))
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "close\n":
            for lease in leases:
                lease.close()
            print("closed", flush=True)
        elif line == "who\n":
            print(" ".join(member.server for member in matchmaker.members("inventory").members), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
