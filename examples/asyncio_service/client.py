"""Two hundred questions at once, from one thread."""

import asyncio

from zmqcore import AsyncClient


async def main():
    async with AsyncClient("quotes", timeout=5.0) as quotes:
        print(await quotes.call("best", 10))

        answers = await asyncio.gather(*(quotes.call("best", quantity) for quantity in range(1, 201)))
        print(len(answers), "answers, the last one", answers[-1]["price"])


asyncio.run(main())
