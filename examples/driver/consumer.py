"""Consume a queue: ``python consumer.py ADDRESS``."""

import signal
import sys
import threading
import zlib

from bus import Message, serve
from zmqcore_driver import ZmqcoreDriver


def handler(message):
    if message.payload["do"] == "checksum":
        (data,) = message.attachments
        return Message({"crc": zlib.crc32(data), "size": len(data)}, message.headers)
    if message.payload["do"] == "count":
        handler.count += 1
        return Message(handler.count)
    raise ValueError(f"nobody here can {message.payload['do']}")


handler.count = 0
driver = ZmqcoreDriver()
# The signal may have interrupted a thread that holds a lock, so another one does it.
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: threading.Thread(target=driver.stop_consuming).start())
print("consuming", flush=True)
serve(driver, sys.argv[1], "work", handler)
driver.close()
