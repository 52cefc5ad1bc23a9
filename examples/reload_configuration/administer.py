"""Give all workers a new configuration: ``python administer.py GREETING``."""

import sys

from zmqcore import Client


def versions(workers):
    """Return the version that each worker works by, and who has not answered."""
    answers = workers.gather("configuration")
    return {member.server: known[0] for member, known in answers.results.items()}, answers.missing


workers = Client("workers", timeout=2.0)
before, _ = versions(workers)
version = max(before.values()) + 1

sent = workers.fanout("configure", version, {"greeting": sys.argv[1]})
print("sent to", *sorted(member.server for member in sent.sent))
for member, reason in sent.failed.items():
    print(f"not sent to {member.server}: {reason}")

# A fanout tells who it was sent to. Whether they have taken it over, they say themselves.
after, missing = versions(workers)
print("version", version, "is with", *sorted(name for name, has in after.items() if has == version))
for name in sorted(
    {name for name, has in after.items() if has != version} | {each.server for each in missing}
):
    print(f"{name} is behind")
