"""What Flower runs of fedscan: an app at the coordinator and one at each site, which bring bytes and look into none.

Imported by Flower's own processes only, in an environment that needs nothing else of fedscan than ``doors``.
"""

import json
import os
import threading
import time
from base64 import b64encode
from collections import defaultdict
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict  # type: ignore[import-not-found,unused-ignore]
from flwr.clientapp import ClientApp  # type: ignore[import-not-found,unused-ignore]
from flwr.serverapp import ServerApp  # type: ignore[import-not-found,unused-ignore]

from fedscan.engines.doors import Data, Knock, Lost, hand_in, relay
from fedscan.engines.flower import DOOR, GATE

SPARE = 5.0  # seconds of a call that are left for its way
LATER = 60.0  # seconds after a call for which Flower keeps its message: they tell the site how long the call takes
LOST = 100  # the code of an error that says what Lost says
PULSE = 15.0  # seconds after which an answer is looked for although nobody said that it has come
RECORD = "fedscan"


class Bringer:
    """Brings requests to sites by messages of Flower, each of one request, from whichever thread asks for it."""

    def __init__(self, grid: Any, gate: Path) -> None:
        self.grid, self.gate, self._known = grid, Knock(gate), threading.Condition()
        self._nodes: dict[str, str] = {}  # site -> public key of its node
        self._ids: dict[str, int] = {}  # public key -> number of the node
        self._heard: dict[str, int] = {}
        self._order: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Follows what the gate tells: whose node is whose, and which sites have said something."""
        news = 0
        while True:
            try:
                told = json.loads(self.gate.call({"act": "since", "news": news, "seconds": 20.0}, b"", 25.0)[:])
            except Lost:
                time.sleep(0.2)
                news = 0
                continue
            news = told["news"]
            with self._known:
                self._nodes = told["nodes"]
                for site in told["said"]:
                    self._heard[site] = self._heard.get(site, 0) + 1
                self._known.notify_all()

    def _node(self, site: str) -> tuple[str, int]:
        """The key and the number of a site's node. Raises Lost where it has none."""
        key = self._nodes.get(site)
        if key is None:
            raise Lost(f"{site} has not joined yet")
        if key not in self._ids:
            self._ids = {b64encode(info.public_key).decode(): info.node_id for info in self.grid.get_nodes()}
        if key not in self._ids:
            raise Lost(f"{site} is just joining")
        return key, self._ids[key]

    def forward(self, site: str, request: Data, seconds: float) -> bytes:
        """What the site says to a request. Raises Lost."""
        if not site:  # who is there?
            return json.dumps(sorted(self._nodes)).encode()
        try:
            return self._brought(site, request, seconds)
        except Lost:
            raise
        except Exception as e:  # Flower raises what its HTTP client raises
            raise Lost(f"Flower did not bring it to {site}: {type(e).__name__}: {e}") from e

    def _brought(self, site: str, request: Data, seconds: float) -> bytes:
        until = time.monotonic() + seconds
        key, node = self._node(site)
        heard = self._heard.get(site, 0)
        message = Message(packed(request), dst_node_id=node, message_type="query", ttl=seconds + LATER)
        with self._order[site]:  # a node that finds half of a message sleeps for seconds before it asks for the rest
            number = next(iter(self.grid.push_messages([message])), None)
            if number is None:
                raise Lost("Flower did not take the message")
            self.gate.call({"act": "sent", "site": site}, b"", 5.0)
        while (left := until - time.monotonic()) > 0:
            with self._known:
                if self._heard.get(site, 0) == heard:
                    self._known.wait(min(PULSE, left))
                heard = self._heard.get(site, 0)
                if self._nodes.get(site) != key:
                    raise Lost(f"Flower's node at {site} was started again")
            for reply in self.grid.pull_messages([number]):
                if reply.has_error():
                    raise Lost(f"{site}: {reply.error.reason}"[:1000])
                return unpacked(reply.content)
        raise Lost(f"nothing came from {site} within {seconds:g} s")


def bring(grid: Any, context: Any) -> None:
    """The app at the coordinator: opens the door through which requests come, and brings them, until it is ended."""
    bringer = Bringer(grid, Path(os.environ[GATE]))
    relay(Path(os.environ[DOOR]), bringer.forward)
    threading.Event().wait()


def receive(message: Any, context: Any) -> Any:
    """The app at a site: hands a request in at the door of the site's own process, and returns what it says."""
    seconds = max(1.0, message.metadata.ttl - LATER - SPARE)
    try:
        return Message(packed(hand_in(Path(os.environ[DOOR]), unpacked(message.content), seconds)), reply_to=message)
    except Lost as e:
        return Message(Error(LOST, str(e)), reply_to=message)


def packed(data: Data) -> Any:
    """Bytes as Flower brings them: an array, for it handles each byte of other values by itself."""
    record = ArrayRecord({RECORD: Array("uint8", (len(data),), "raw", b"")})
    record[RECORD].data = data  # as Flower does it, without a copy; at first, it takes nothing but ``bytes``
    return RecordDict({RECORD: record})


def unpacked(content: Any) -> bytes:
    """The bytes that were packed."""
    return bytes(content[RECORD][RECORD].data)


server = ServerApp()  # Flower finds both by these names, in this text
client = ClientApp()
server.main()(bring)
client.query()(receive)
