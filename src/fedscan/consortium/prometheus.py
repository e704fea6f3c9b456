"""How a run stands, for Prometheus: at a port of this machine, where it was asked for.

Nothing is counted here. What is shown is what ``status`` was told by then, read when somebody asks for it.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any

from fedscan.consortium.status import DOES, Status, Tally
from fedscan.run import Problem
from fedscan.spec import Refused

if TYPE_CHECKING:
    from prometheus_client.core import Metric

HOST = "127.0.0.1"
MOST, SILENCE = 8, 5.0  # callers at once, and seconds in which each has to say something: a run needs its sockets
LAST = 30.0  # seconds that the end of a run waits to be read, where somebody reads
STATES = ("begins", "waits", "asks", "ended", "stopped", "failed")
RUN = {
    "round": "The round that is asked for; 0 before the first.",
    "rounds": "How many rounds the study has.",
}
HOSPITAL = {  # by entry of a hospital's status
    "answers": "Questions that it answered.",
    "refusals": "Questions that were refused: by it, or its answer by the coordinator.",
    "absences": "Questions at whose end it was absent.",
    "bytes_down": "Bytes of messages to it.",
    "bytes_up": "Bytes of its answers.",
}


class Exposed:
    """Metrics at a port ("9464", of this machine only, or "HOST:PORT") while this context lasts; none without one.

    What is shown is what ``run`` or ``hospital`` named. Raises Problem where the port cannot be had.
    """

    def __init__(self, where: str | None) -> None:
        self.where = where
        self._families: Callable[[], Iterable[Metric]] = tuple
        self._read, self._was_read = threading.Event(), False
        self._server: ThreadingTCPServer | None = None

    def __enter__(self) -> "Exposed":
        if self.where is not None:
            self._server = served(self.where, self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._server is None:
            return
        if self._was_read and (kind is None or issubclass(kind, Exception)):  # nobody waits for this after a Ctrl-C
            print(f"waiting {LAST:g} s at most, until how it ended was read at port {self.where}", file=sys.stderr)
            self._read.clear()
            with suppress(KeyboardInterrupt):
                self._read.wait(LAST)
        self._server.shutdown()
        self._server.server_close()

    def run(self, status: Status) -> None:
        """From now on, how the coordinator's run stands is shown."""
        self._families = partial(of_run, status)

    def hospital(self, tally: Tally, connected: Callable[[], float | None]) -> None:
        """From now on, what a hospital's desk was asked is shown, and for how long the engine has heard nothing."""
        self._families = partial(of_hospital, tally, connected)

    def collect(self) -> Iterator["Metric"]:
        """What there is to show at this moment."""
        yield from self._families()
        self._was_read = True
        self._read.set()


def served(where: str, collector: Exposed) -> ThreadingTCPServer:
    """A server of metrics, at work in a thread of its own: it reads one line and some headers, and believes neither."""
    from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector

    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)

    class Handler(MetricsHandler):
        timeout = SILENCE
        server_version, sys_version = "fedscan", ""

    class Server(ThreadingTCPServer):
        allow_reuse_address, daemon_threads = True, True
        room = threading.BoundedSemaphore(MOST)

        def process_request(self, request: Any, client_address: Any) -> None:
            if self.room.acquire(timeout=SILENCE):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.room.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Whoever asked has gone, or asked for nothing that can be understood."""

    host, port = address(where)
    try:
        server = Server((host, port), Handler.factory(registry))
    except OSError as e:
        why = (e.strerror or str(e)).lower()
        raise Problem(f"--metrics {where}: port {port} of {host} cannot be had ({why}): choose another.") from e
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    return server


def address(text: str) -> tuple[str, int]:
    """Host and port of "PORT" or "HOST:PORT". Raises Problem for anything else."""
    host, colon, port = text.rpartition(":")
    if (colon and not host) or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise Problem(f"--metrics {text}: PORT or HOST:PORT was meant, such as 9464.")
    return host or HOST, int(port)


def of_run(status: Status) -> Iterator["Metric"]:
    """How the coordinator's run stands, and each of its hospitals."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    told, now = status.told, time.time()
    for name, said in RUN.items():
        yield GaugeMetricFamily(f"fedscan_serve_{name}", said, value=told[name])
    state = GaugeMetricFamily("fedscan_serve_state", "1 for the state that the run is in.", labels=["state"])
    for name in STATES:
        state.add_metric([name], told["state"].split(" ")[0] == name)
    yield state
    does = GaugeMetricFamily(
        "fedscan_serve_hospital_state", "1 for what the hospital does, or is.", labels=["hospital", "state"]
    )
    silence = GaugeMetricFamily(
        "fedscan_serve_hospital_silence_seconds", "Since it was last heard, if it was.", labels=["hospital"]
    )
    lease = GaugeMetricFamily(
        "fedscan_serve_hospital_lease_seconds", "What is left of its lease, while it is asked.", labels=["hospital"]
    )
    for hospital, known in told["sites"].items():
        for name in dict.fromkeys(DOES.values()):
            does.add_metric([hospital, name], known["does"] == name)
        if known["heard"] is not None:
            silence.add_metric([hospital], now - known["heard"])
        if left := status.leases.get(hospital):
            lease.add_metric([hospital], left.left)
    yield from (does, silence, lease)
    for entry, said in HOSPITAL.items():
        what = {"bytes_down": "sent_bytes", "bytes_up": "received_bytes"}.get(entry, entry)
        counter = CounterMetricFamily(f"fedscan_serve_hospital_{what}", said, labels=["hospital"])
        for hospital, known in told["sites"].items():
            counter.add_metric([hospital], known[entry])
        yield counter


def of_hospital(tally: Tally, connected: Callable[[], float | None]) -> Iterator["Metric"]:
    """What a hospital's desk was asked and has let out; ``connected``: seconds since the engine heard its other end."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    yield CounterMetricFamily("fedscan_join_answers", "Questions answered.", value=tally.answers)
    yield CounterMetricFamily("fedscan_join_refusals", "Questions refused.", value=tally.refusals)
    yield CounterMetricFamily(
        "fedscan_join_unheard", "Requests of nobody who may ask, or old ones: nothing was done.", value=tally.unheard
    )
    yield CounterMetricFamily("fedscan_join_received_bytes", "Bytes of all that came.", value=tally.came)
    left = CounterMetricFamily("fedscan_join_left_bytes", "Bytes of answers that left.", labels=["privacy"])
    for privacy, nbytes in sorted(tally.left.items()):
        left.add_metric([privacy], nbytes)
    yield left
    waits = "1 while no signed yes holds, so that nothing is answered."
    yield GaugeMetricFamily("fedscan_join_waits_for_yes", waits, value=not agreed(tally))
    for name, seconds, said in (
        ("coordinator_silence", tally.heard and time.time() - tally.heard, "Since the coordinator last asked."),
        ("connection_silence", connected(), "Since anything came over the connection, over NVFlare and Flower."),
    ):
        if seconds is not None:
            yield GaugeMetricFamily(f"fedscan_join_{name}_seconds", said, value=seconds)


def agreed(tally: Tally) -> bool:
    """Whether a signed yes holds at this moment."""
    try:
        tally.desk.about()
    except (Refused, Problem, OSError):
        return False
    return True
