"""Serve an object: its public methods can be called."""

from zmqcore import Server


class Greeter:
    def __init__(self):
        self.guests = []

    def greet(self, name):
        self.guests.append(name)
        return f"hello, {name}; you are guest number {len(self.guests)}"

    def leave(self, name):
        self.guests.remove(name)


if __name__ == "__main__":
    print("serving, until Ctrl-C", flush=True)
    # One thread: a list needs no lock then.
    Server("greeter", Greeter(), workers=0).serve_forever()
