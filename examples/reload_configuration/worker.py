"""A worker whose configuration can be replaced while it runs: ``python worker.py NAME``."""

import sys

from zmqcore import Client, Server


class Worker:
    def __init__(self):
        self.current = 0, {"greeting": "hello, {name}"}

    def configure(self, version, settings):
        if version > self.current[0]:
            self.current = version, settings  # one assignment: nobody ever sees half of it

    def configuration(self):
        return self.current

    def greet(self, name):
        _, settings = self.current
        return settings["greeting"].format(name=name)


def catch_up(worker):
    """Ask all workers, this one included, and take the newest configuration."""
    answers = Client("workers", timeout=1.0).gather("configuration")
    worker.configure(*max(answers.results.values(), key=lambda known: known[0]))


if __name__ == "__main__":
    worker = Worker()
    # workers=1: what comes from one client is run in the order in which it was sent.
    with Server("workers", worker, server=sys.argv[1], workers=1) as server:
        catch_up(worker)
        print(f"{sys.argv[1]} works by version {worker.current[0]}", flush=True)
        server.serve_forever()
