"""A service that asks other services, all at once, and does not wait for the slowest."""

import asyncio
import contextlib

import zmqcore
from zmqcore import AsyncClient, AsyncServer


class Quotes:
    def __init__(self, suppliers):
        self.suppliers = suppliers

    async def best(self, quantity):
        # Who waits for this has little use for an answer that comes when his time is over.
        patience = zmqcore.time_left() / 2
        answers = await self.suppliers.prepare(timeout=patience).gather("price", quantity)
        if not answers.results:
            raise LookupError(f"none of {len(answers.missing)} suppliers has answered in {patience:.1f} s")
        member, price = min(answers.results.items(), key=lambda offer: offer[1])
        return {"from": member.server, "price": price, "silent": [each.server for each in answers.missing]}


async def main():
    async with AsyncClient("suppliers") as suppliers, AsyncServer("quotes", Quotes(suppliers)) as server:
        print("serving, until Ctrl-C", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # asyncio.run raises it after the server has drained
        asyncio.run(main())
