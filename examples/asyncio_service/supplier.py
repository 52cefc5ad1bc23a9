"""A supplier who answers after a while: ``python supplier.py NAME PRICE SECONDS``."""

import asyncio
import contextlib
import sys

from zmqcore import AsyncServer


class Supplier:
    def __init__(self, price, seconds):
        self.unit_price = price
        self.seconds = seconds

    async def price(self, quantity):
        await asyncio.sleep(self.seconds)  # a database, a form in triplicate, …
        return round(self.unit_price * quantity, 2)


async def main(name, price, seconds):
    async with AsyncServer("suppliers", Supplier(float(price), float(seconds)), server=name) as server:
        print(f"{name} is open", flush=True)
        await server.serve_forever(drain_timeout=1.0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
