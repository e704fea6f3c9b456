"""Inside NVFlare's processes: takes requests from the door at the coordinator to NVFlare, and from NVFlare to a site's.

For the environment of NVFlare only: ``engines.nvflare`` starts ``python -m fedscan.engines.nvflare_courier FOLDER``.
"""

import base64
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context
from nvflare.fuel.f3.drivers.socket_conn import SocketConnection
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.fuel.f3.sfm import conn_manager
from nvflare.private.fed.utils import identity_utils

from fedscan.engines.doors import Data, Door, Lost, hand_in, relay
from fedscan.engines.kept import HEARD, ORPHANED, OWNER, lock_for_life, owned
from fedscan.engines.nvflare import MEMBER

CHANNEL, TOPIC, PING, SECONDS, LOST = "fedscan", "request", "ping", "fedscan_seconds", "fedscan_lost"
AGAIN = 0.1  # seconds until a site that is away is looked for again
SILENCE = 30.0  # seconds without a word after which a connection that seems up is given up
DIAL = 5.0  # seconds that it may take to reach the coordinator
RETRIES = (0.5, 2.0)  # seconds until a site tries that again: at first, and at most


class AtCoordinator(FLComponent):  # type: ignore[misc]
    """A component of NVFlare's server: keeps the door in ``folder``, and brings what comes through it to sites."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.door: Door | None = None
        self.ready: dict[str, Any] = {}  # by site, the connection on which its courier has answered

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Opens the door as soon as NVFlare's server is up."""
        if event_type == EventType.SYSTEM_START:
            self.cell = fl_ctx.get_engine().get_cell()
            self.cell.register_request_cb(channel=CHANNEL, topic=PING, cb=awake)
            self.door = relay(self.folder, self.forward)

    def forward(self, site: str, request: Data, seconds: float) -> bytes:
        """What the site said; the list of connected sites where none is named. Waits for a site that is away.

        Raises Lost where nothing came within ``seconds``, or the site could not be asked at its own end.
        """
        if not site:
            return json.dumps(sorted(name for name in self.cell.core_cell.agents if "." not in name)).encode()
        until, why, patience = time.monotonic() + seconds, "it is not connected", 0.5
        while (left := until - time.monotonic()) > 0:
            met = connection(self.cell, site)
            if met is None:
                patience = 0.5
            elif not self.listening(site, met, patience):
                patience = min(2 * patience, 8.0)  # for a line that takes so long
            else:
                reply = self.cell.send_request(
                    channel=CHANNEL, topic=TOPIC, target=site, request=Message({SECONDS: left}, memoryview(request)),
                    timeout=left, optional=True, abort_signal=Gone(self.cell, site, met, until),
                )  # fmt: skip
                code = reply.get_header(MessageHeaderKey.RETURN_CODE)
                if code == ReturnCode.OK:
                    if (lost := reply.get_header(LOST)) is not None:
                        raise Lost(str(lost))
                    return taken(reply)
                why = f"NVFlare says {code}"
            time.sleep(AGAIN)
        raise Lost(f"{site} was not reached within {seconds:g} s: {why}")

    def listening(self, site: str, met: Any, seconds: float) -> bool:
        """Whether a site's courier is there. NVFlare connects before it is, and drops what it is sent till then."""
        if self.ready.get(site) is not met and answers(self.cell, site, seconds):
            self.ready[site] = met
        return self.ready.get(site) is met


class Gone:
    """NVFlare's signal to wait no more: the connection that a request went over is no longer, or time is up."""

    def __init__(self, cell: Any, site: str, met: Any, until: float) -> None:
        self.cell, self.site, self.met, self.until = cell, site, met, until

    @property
    def triggered(self) -> bool:
        """Whether to give up."""
        return connection(self.cell, self.site) is not self.met or time.monotonic() > self.until


class AtSite(FLComponent):  # type: ignore[misc]
    """A component of NVFlare's client: hands what the coordinator asks to the door in ``folder``, and answers back."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Listens as soon as NVFlare's server has admitted this client."""
        if event_type == EventType.SYSTEM_START:
            self.cell = fl_ctx.get_engine().get_cell()
            self.cell.register_request_cb(channel=CHANNEL, topic=TOPIC, cb=self.answer)
            self.cell.register_request_cb(channel=CHANNEL, topic=PING, cb=awake)
            threading.Thread(target=self.mind, daemon=True).start()

    def answer(self, request: Any) -> Any:
        """The reply to a request of the coordinator's; no other site can ask."""
        if request.get_header(MessageHeaderKey.ORIGIN) != FQCN.ROOT_SERVER:
            return make_reply(ReturnCode.UNAUTHENTICATED)
        try:
            said = hand_in(self.folder, taken(request), float(request.get_header(SECONDS)))
        except Lost as e:
            reply = make_reply(ReturnCode.OK)
            reply.set_header(LOST, str(e))
            return reply
        return make_reply(ReturnCode.OK, body=memoryview(said))

    def mind(self) -> None:
        """Notes when the server last answered, and sees to it that something passes on the connection."""
        while True:
            if answers(self.cell, FQCN.ROOT_SERVER, 5.0):
                Path(HEARD).touch()  # NVFlare runs in the folder of its start-up files
            time.sleep(5.0)


def taken(message: Any) -> bytes:
    """The bytes of a message, whose buffer is given back at once: NVFlare would hold it for a minute or more."""
    payload = message.payload
    if not isinstance(payload, memoryview):
        return bytes(payload or b"")
    with payload:
        return bytes(payload)


def awake(_: Any) -> Any:
    """The reply to a courier that asks whether this one is there."""
    return make_reply(ReturnCode.OK)


def connection(cell: Any, where: str) -> Any:
    """The connection with a site or with the server that is in use now; None where there is none."""
    endpoint = cell.core_cell.communicator.conn_manager.sfm_endpoints.get(where)
    return next(iter(endpoint.connections), None) if endpoint else None


def answers(cell: Any, where: str, seconds: float) -> bool:
    """Whether the courier at the other end of a connection is there."""
    reply = cell.send_request(
        channel=CHANNEL, topic=PING, target=where, request=Message({}, b""), timeout=seconds, optional=True
    )
    return bool(reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK)


def run(folder: Path) -> None:
    """Runs NVFlare's server or client in this process, as its own command does; one process in a folder."""
    lock_for_life(folder)
    threading.Thread(target=end_with_owner, args=(folder,), daemon=True).start()
    sign_with_p256()
    dial_soon()
    member = json.loads((folder / MEMBER).read_text())
    role = member["role"]
    settings = ["secure_train=true", "config_folder=config", f"org={member['consortium']}"]
    settings += [f"uid={member['name']}"] if role == "client" else []
    sys.argv = [role, "-m", str(folder), "-s", f"fed_{role}.json", "--set", *settings]
    if role == "server":
        from nvflare.private.fed.app.server import server_train as command
    else:
        from nvflare.private.fed.app.client import client_train as command
    arguments = command.parse_arguments()
    sys.exit(MainProcessMonitor.run(main_func=command.main, run_dir=arguments.workspace, args=arguments))


def end_with_owner(folder: Path) -> None:
    """Ends the process once its owner (``serve`` or ``join``) has been away for long, or its folder is gone."""
    seen = time.monotonic()
    while time.monotonic() - seen < ORPHANED and (folder / OWNER).exists():
        if owned(folder):
            seen = time.monotonic()
        time.sleep(5.0)
    os._exit(0)


def sign_with_p256() -> None:
    """Lets NVFlare's challenge be answered with ECDSA over P-256 and SHA-256, instead of RSA with PSS.

    NVFlare 2.9 speaks TLS with any key, and then has both sides sign a nonce, for which it knows RSA only.
    """
    scheme = ec.ECDSA(SHA256())

    def sign(content: str | bytes, signing_pri_key: Any, return_str: bool = True) -> str | bytes:
        signature = signing_pri_key.sign(content.encode() if isinstance(content, str) else content, scheme)
        return base64.b64encode(signature).decode() if return_str else bytes(signature)

    def verify(content: str | bytes, signature: str | bytes, public_key: Any) -> None:
        made = base64.b64decode(signature) if isinstance(signature, str) else signature
        public_key.verify(made, content.encode() if isinstance(content, str) else content, scheme)

    for name, own in {"sign_content": sign, "verify_content": verify}.items():
        if not hasattr(identity_utils, name):
            raise RuntimeError("this NVFlare signs challenges in another way than 2.9: install nvflare>=2.9,<2.10")
        setattr(identity_utils, name, own)


class Watched(SocketConnection):  # type: ignore[misc]
    """A connection that is closed after ``SILENCE`` without a word from the server, which the courier often asks."""

    def read_loop(self) -> None:
        """Reads until the connection is closed."""
        self.heard, over = time.monotonic(), threading.Event()
        threading.Thread(target=self.watch, args=(over,), daemon=True).start()
        super().read_loop()
        over.set()

    def process_frame(self, frame: Any) -> None:
        """Takes what came."""
        self.heard = time.monotonic()
        super().process_frame(frame)

    def watch(self, over: threading.Event) -> None:
        """Closes what has been silent for too long."""
        while not over.wait(1.0):
            if time.monotonic() > self.heard + SILENCE:
                self.close()


def dial_soon() -> None:
    """Lets a site give up a connection that does not come about or has died without a word, and try again soon.

    NVFlare waits for ever for the handshake of whoever has let it in and says nothing, does not notice for a quarter of
    an hour that a connection is dead, and tries again up to ten seconds after a network is back.
    """

    def connect(driver: Any, connector: Any) -> None:
        driver.connector = connector
        there = (connector.params[DriverParams.HOST.value], int(connector.params[DriverParams.PORT.value]))
        context = get_ssl_context(connector.params, ssl_server=False)
        sock = socket.create_connection(there, DIAL)
        if context:
            sock = context.wrap_socket(sock)
        sock.settimeout(None)  # one that may time out does not block, and TLS of Python then fails two threads at once
        connection = Watched(sock, connector, bool(context))
        driver.add_connection(connection)
        connection.read_loop()
        connection.close()
        driver.close_connection(connection)

    TcpDriver.connect = connect
    if not {"INIT_WAIT", "MAX_WAIT", "SILENT_RECONNECT_TIME"} <= vars(conn_manager).keys():
        raise RuntimeError("this NVFlare connects in another way than 2.9: install nvflare>=2.9,<2.10")
    conn_manager.INIT_WAIT, conn_manager.MAX_WAIT = RETRIES
    conn_manager.SILENT_RECONNECT_TIME = RETRIES[1]  # from which on its log says what is wrong


if __name__ == "__main__":
    run(Path(sys.argv[1]))
