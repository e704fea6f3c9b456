"""A bad network on loopback: a TCP proxy that delays, throttles, stalls, resets, deafens and cuts what passes.

TCP itself sends again what was lost, so whoever speaks over TCP never misses a byte: to them loss is a stall of what
comes after the lost piece (``loss``), or, where too much is lost, a connection that is reset (``reset``, ``flaky``) or
that dies without a word (``deaf``, ``strand``).
"""

import asyncio
import math
import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

PIECE, AHEAD = 16 << 10, 64  # bytes that are read at once, and pieces that are on their way at most, of one connection
STALL = 0.3  # seconds until TCP sends again what was lost, at first; twice as many each time that it is lost again
TICK = 0.02
RESET = struct.pack("ii", 1, 0)  # closing sends RST
Pieces = asyncio.Queue[tuple[float, bytes]]  # and from when on each may arrive


class Link:
    """One connection through the proxy: a socket to whoever called, and one to the server."""

    def __init__(self, inner: socket.socket, outer: socket.socket | None) -> None:
        self.sockets = [inner] if outer is None else [inner, outer]
        self.stranded, self.ways = False, 2
        self.tasks: list[asyncio.Task[None]] = []

    def close(self) -> None:
        """Closes both sockets."""
        for sock in self.sockets:
            sock.close()


class Proxy:
    """Stands between callers and the server at ``port`` of this machine; every setting may be changed at any moment.

    ``latency`` seconds each way; ``rate`` bytes a second, each way, of each connection; ``loss`` is the share of pieces
    that TCP has to send again, drawn from ``seed``; while ``deaf``, nothing passes, all stays open and who calls is let
    in. ``carried`` counts the bytes that have passed, ``callers`` the connections.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self.server, self.random = ("127.0.0.1", port), random.Random(seed)
        self.latency, self.rate, self.loss, self.deaf = 0.0, math.inf, 0.0, False
        self.carried = {"up": 0, "down": 0}
        self.callers, self.resets = 0, 0
        self._links: set[Link] = set()
        self._every, self._flaky = math.inf, math.inf
        self._listening: socket.socket | None = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # -- what a test does to the network -----------------------------------------------------------------------------

    def reset(self) -> None:
        """Resets (RST) every connection that is open; new ones are let in."""
        self._soon(self._reset)

    def flaky(self, every: float = math.inf) -> None:
        """Resets one connection at random moments, ``every`` so many seconds in the mean; never any more by default."""
        self._every = every
        self._flaky = 0.0  # drawn anew

    def strand(self) -> None:
        """Lets all connections that are open now die without a word; new ones are carried."""
        self._soon(lambda: [setattr(link, "stranded", True) for link in self._links])

    def cut(self) -> None:
        """Closes every connection, and refuses new ones until ``mend``."""
        self._soon(self._cut)

    def mend(self) -> None:
        """The network is as it was: nothing is cut or deaf, and nothing is reset any more."""
        self.deaf = False
        self.flaky()
        self._soon(self._listen)

    def close(self) -> None:
        """Ends it all."""
        self._soon(self._cut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- in its own thread -------------------------------------------------------------------------------------------

    def _soon(self, what: Callable[[], object]) -> None:
        async def do() -> None:
            what()

        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(do(), self._loop).result(10.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        main = self._loop.create_task(self._serve())
        self._loop.run_forever()
        main.cancel()
        self._loop.run_until_complete(asyncio.gather(main, return_exceptions=True))

    def _reset(self) -> None:
        self.resets += len(self._links)
        for link in list(self._links):
            self._end(link)

    def _cut(self) -> None:
        self._reset()
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def _listen(self) -> None:
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self.port))
            self._listening.setblocking(False)

    def _end(self, link: Link, abruptly: bool = True) -> None:
        """Closes a connection at both ends, by RST if ``abruptly``."""
        if link not in self._links:
            return
        self._links.discard(link)
        for task in link.tasks:
            task.cancel()
        for sock in link.sockets if abruptly else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._loop.call_soon(link.close)  # not before the loop has let go of them

    async def _serve(self) -> None:
        """Lets callers in, and resets a connection when its moment has come."""
        while True:
            if self._listening is not None:
                with suppress(BlockingIOError):
                    await self._let_in(self._listening.accept()[0])
                    continue
            now = self._loop.time()
            if self._flaky == 0.0:
                self._flaky = now + self.random.expovariate(1 / self._every) if self._every < math.inf else math.inf
            if now > self._flaky:
                self._flaky = 0.0
                if self._links:
                    self.resets += 1
                    self._end(self.random.choice(list(self._links)))
            await asyncio.sleep(TICK)

    async def _let_in(self, inner: socket.socket) -> None:
        self.callers += 1
        inner.setblocking(False)
        outer = None
        if not self.deaf:
            outer = socket.socket()
            outer.setblocking(False)
            try:
                await self._loop.sock_connect(outer, self.server)
            except OSError:  # there is no server: the caller is told so
                inner.close()
                outer.close()
                return
        link = Link(inner, outer)
        self._links.add(link)
        if outer is not None:  # who is let in while nothing passes stays where he is, for good
            for sock in link.sockets:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for way, source, sink in (("up", inner, outer), ("down", outer, inner)):
                ahead: Pieces = asyncio.Queue(AHEAD)
                link.tasks.append(self._loop.create_task(self._read(source, ahead)))
                link.tasks.append(self._loop.create_task(self._write(link, way, sink, ahead)))

    async def _read(self, source: socket.socket, ahead: Pieces) -> None:
        """Takes in what comes, and says from when on it may arrive at the other side."""
        last, data = 0.0, b"begins"
        while data:
            try:
                data = await self._loop.sock_recv(source, PIECE)
            except OSError:
                data = b""
            due, stall = self._loop.time() + self.latency, STALL
            while self.random.random() < self.loss:
                due, stall = due + stall, 2 * stall
            last = max(last, due)  # in order: what comes after a piece that was lost waits for it
            await ahead.put((last, data))

    async def _write(self, link: Link, way: str, sink: socket.socket, ahead: Pieces) -> None:
        """Lets pass what may arrive by now; ends the connection where both ways have come to their end."""
        try:
            while True:
                due, data = await ahead.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                while self.deaf or link.stranded:
                    await asyncio.sleep(TICK)
                if not data:
                    break
                await self._loop.sock_sendall(sink, data)
                self.carried[way] += len(data)
                await asyncio.sleep(len(data) / self.rate)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            link.ways = 0
        link.ways -= 1
        if link.ways <= 0:
            self._end(link, abruptly=link.ways < 0)
