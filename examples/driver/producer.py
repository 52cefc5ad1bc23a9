"""Publish and ask: ``python producer.py ADDRESS``."""

import sys

from bus import Failed, Message, Undelivered
from zmqcore_driver import ZmqcoreDriver

driver = ZmqcoreDriver(max_sockets=8)
address = sys.argv[1]

for _ in range(1000):
    driver.publish(address, "work", Message({"do": "count"}), timeout=2.0)
print(driver.ask(address, "work", Message({"do": "count"}), timeout=2.0).payload)

picture = bytearray(b"\xff" * 1_000_000)
answer = driver.ask(address, "work", Message({"do": "checksum"}, {"trace": "a1"}, [picture]), timeout=2.0)
print(answer.payload, answer.headers)

try:
    driver.ask(address, "work", Message({"do": "magic"}), timeout=2.0)
except Failed as exc:
    print("failed:", exc)

try:
    driver.publish("tcp://127.0.0.1:9", "work", Message({"do": "count"}), timeout=1.0)
except Undelivered as exc:
    print("undelivered:", exc)

driver.close()
