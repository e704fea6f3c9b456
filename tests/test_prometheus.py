"""Metrics on request: they say how a run stands while it goes, and whoever asks for them cannot stop it."""

import socket
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from commands import Command, refused
from fedscan.consortium import approval, prometheus, serving
from fedscan.consortium.prometheus import Exposed, address
from fedscan.consortium.proposals import office
from fedscan.consortium.status import DOES, SPEAKS, Status, Tally
from fedscan.engines.doors import Door
from fedscan.engines.kept import free_port
from fedscan.engines.remote import Lease
from fedscan.launch import How
from fedscan.ledger import read_record
from fedscan.run import Problem
from joined import SITES, Hospitals

Found = dict[tuple[str, ...], float]


def scraped(port: int) -> Found:
    """Every value of fedscan's by its name and the values of its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as said:
        families = list(text_string_to_metric_families(said.read().decode()))
    return {
        (s.name.removeprefix("fedscan_"), *(v for _, v in sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
        if s.name.startswith("fedscan_")
    }


@pytest.fixture
def hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospitals:
    monkeypatch.setattr(serving, "GREETING", 0.05)
    monkeypatch.setattr(prometheus, "LAST", 0.1)
    monkeypatch.setattr(prometheus, "SILENCE", 0.2)
    made = Hospitals(tmp_path)
    for name in SITES:
        made.approve(name)
    return made


@pytest.fixture
def tallies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tally]:
    """The tallies of the hospitals that join from now on, in place of their bare desks."""
    made: dict[str, Tally] = {}

    def counted(desk: Any, folder: Path) -> Door:
        made[desk.name] = tally = Tally(desk)
        return Door(folder, lambda header, body: tally.handle(body))

    monkeypatch.setattr("joined.opened", counted)
    return made


def carried_out(hospitals: Hospitals, run: Path, port: int, look: Callable[[str, Any], None]) -> None:
    """The whole study, with metrics at the port; ``look`` watches it."""
    with hospitals.there(*SITES), Exposed(str(port)) as exposed:
        serving.serve(hospitals.file, run, hospitals.table(watch=exposed.run, how=How(watch=look)))


def test_a_run_is_seen_as_it_goes(hospitals: Hospitals, tmp_path: Path) -> None:
    port, seen = free_port(), list[Found]()

    def look(what: str, value: Any) -> None:
        if what in ("round", "scores"):
            seen.append(scraped(port))

    carried_out(hospitals, tmp_path / "run", port, look)
    turns = read_record(tmp_path / "run").turns
    begin, *_, last = seen
    assert (begin["serve_round",], begin["serve_rounds",], begin["serve_state", "asks"]) == (1, 2, 1)
    assert sum(value for name, value in begin.items() if name[0] == "serve_state") == 1
    for name in SITES:
        mine = [turn for turn in turns if turn.site == name]
        assert begin["serve_hospital_answers_total", name] == 0
        assert begin["serve_hospital_state", name, "answering"] == 1
        assert last["serve_hospital_answers_total", name] == len(mine) > 4
        assert last["serve_hospital_sent_bytes_total", name] == sum(turn.bytes_down for turn in mine)
        assert last["serve_hospital_received_bytes_total", name] == sum(turn.bytes_up for turn in mine)
        assert last["serve_hospital_refusals_total", name] == last["serve_hospital_absences_total", name] == 0
        assert 0 <= last["serve_hospital_silence_seconds", name] < 60
    labels = {label for found in seen for _, *labels in found for label in labels}
    assert labels <= {*SITES, *DOES.values(), *prometheus.STATES}
    with pytest.raises(OSError):
        scraped(port)  # closed with the run


def test_what_left_a_hospital_is_counted_by_its_class(
    hospitals: Hospitals, tallies: dict[str, Tally], tmp_path: Path
) -> None:
    found: list[Found] = []

    def look(what: str, value: Any) -> None:
        if what == "round" and value == 2:
            at = office(tmp_path / "west")
            approval.reject(at.home, at.proposal(hospitals.file).asks, at.policy, "second thoughts", who="west")

    with hospitals.there(*SITES):
        serving.serve(hospitals.file, tmp_path / "run", hospitals.table(how=How(watch=look)))
        for name in SITES:
            with Exposed(str(port := free_port())) as exposed:
                exposed.hospital(tallies[name], lambda: 3.0)
                found.append(scraped(port))
        assert tallies["east"].desk.handle(b"nonsense")
        tallies["east"].handle(b"nonsense")
    turns = read_record(tmp_path / "run").turns
    for name, seen in zip(SITES, found, strict=True):
        mine = [turn for turn in turns if turn.site == name]
        answered = [turn for turn in mine if turn.status == "answered"]
        assert seen["join_answers_total",] == len(answered)
        assert seen["join_refusals_total",] == len(mine) - len(answered)
        for privacy in ("weights", "statistics"):
            nbytes = sum(turn.bytes_up for turn in answered if turn.privacy == privacy)
            assert seen["join_left_bytes_total", privacy] == nbytes > 0
        assert seen["join_received_bytes_total",] > sum(turn.bytes_down for turn in mine)
        assert (seen["join_unheard_total",], seen["join_connection_silence_seconds",]) == (0, 3)
        assert 0 <= seen["join_coordinator_silence_seconds",] < 60
    assert [seen["join_waits_for_yes",] for seen in found] == [0, 1]
    assert tallies["east"].unheard == 1


def test_whoever_asks_for_nonsense_does_not_stop_the_run(hospitals: Hospitals, tmp_path: Path, capfd: Any) -> None:
    port, held = free_port(), list[socket.socket]()

    def look(what: str, value: Any) -> None:
        if what != "round":
            return
        for hostile in (
            b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * (1 << 20) + b"\r\n\r\n",
            b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
            b"GET /?name[]=\x00%ff&name[]=fedscan HTTP/9.9\r\nAccept: \xff\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
            b"\x16\x03\x01\x02\x00" + bytes(range(256)),
            b"",
        ):
            sock = socket.create_connection(("127.0.0.1", port), timeout=20)
            with sock, suppress(OSError):
                sock.sendall(hostile)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1 << 16)
        held.extend(socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(2 * prometheus.MOST))

    carried_out(hospitals, tmp_path / "run", port, look)
    assert {turn.status for turn in read_record(tmp_path / "run").turns} == {"answered"}
    assert len(held) == 4 * prometheus.MOST
    assert "Traceback" not in capfd.readouterr().err
    for sock in held:
        sock.close()


def test_who_says_nothing_makes_room_after_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prometheus, "SILENCE", 0.2)
    monkeypatch.setattr(prometheus, "LAST", 0.1)
    port = free_port()
    with Exposed(str(port)) as exposed:
        exposed.run(Status(tmp_path, SITES, 3, lambda site, sentence: None))
        held = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(prometheus.MOST)]
        assert scraped(port)["serve_rounds",] == 3
        for sock in held:
            sock.close()


def test_the_end_waits_to_be_read_where_somebody_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.setattr(prometheus, "LAST", 0.1)
    status = Status(tmp_path, SITES, 3, lambda site, sentence: None)
    with Exposed(str(free_port())):
        pass
    assert capfd.readouterr().err == ""

    def ends(error: BaseException) -> None:
        port = free_port()
        with Exposed(str(port)) as exposed, status:
            exposed.run(status)
            assert scraped(port)["serve_rounds",] == 3
            raise error

    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())
    assert "until how it ended was read" in capfd.readouterr().err
    assert status.told["state"] == "failed"
    with pytest.raises(KeyboardInterrupt):
        ends(KeyboardInterrupt())
    assert capfd.readouterr().err == ""
    assert status.told["state"] == "stopped"


def test_what_is_left_of_a_lease_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prometheus, "LAST", 0.1)
    status, port = Status(tmp_path, SITES, 3, lambda site, sentence: None), free_port()
    status.leases = {"west": Lease(600.0, 60.0)}
    with Exposed(str(port)) as exposed:
        exposed.run(status)
        found = scraped(port)
    assert 0 < found["serve_hospital_lease_seconds", "west"] <= 60
    assert ("serve_hospital_lease_seconds", "east") not in found
    assert ("serve_hospital_silence_seconds", "west") not in found  # never heard


def test_how_each_sentence_is_counted(tmp_path: Path) -> None:
    """Every sentence that the coordinator tells of a hospital begins as one of the table."""
    status = Status(tmp_path, ("east",), 1, lambda site, sentence: None)
    for sentence, does in {
        "is waited for: nobody is there (until 12:00:00)": "waited for",
        "works on learn (until 12:00:00)": "answering",
        "answers later: east answers Mon-Fri 18:00-06:00 (its time)": "away",
        "is absent: no progress for 600 s": "absent",
        "absent learn: no progress": "absent",
        "refused learn": "answering",
    }.items():
        before = status.told["sites"]["east"]["heard"]
        status.site("east", sentence)
        assert status.told["sites"]["east"]["does"] == does
        assert (status.told["sites"]["east"]["heard"] != before) == sentence.startswith(SPEAKS)
    assert set(SPEAKS) < set(DOES)
    asked = SimpleNamespace(site="east")
    status.turn(SimpleNamespace(turn=asked, status="refused", question="learn", why="no", bytes_down=1, bytes_up=1))
    assert status.told["sites"]["east"]["state"] == "refused learn: no"


@pytest.mark.parametrize("where", ["", "x", ":9464", "0", "65536", "9464/", "٣", "host:", "-1"])
def test_what_is_no_port_is_said(where: str) -> None:
    with pytest.raises(Problem, match="PORT or HOST:PORT was meant"):
        address(where)


def test_a_port_is_this_machines_unless_a_host_is_said() -> None:
    assert address("9464") == ("127.0.0.1", 9464)
    assert address("0.0.0.0:9464") == ("0.0.0.0", 9464)


def test_a_port_in_use_is_said_before_anything_begins(hospitals: Hospitals, fedscan: Command, tmp_path: Path) -> None:
    words = ["serve", "study.toml", "--folder", "charite", "--engine", "loopback", "--sites", ".", "--out", "run"]
    join = ["join", "study.toml", "--folder", "east", "--engine", "loopback"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in (words, join):
            refused(fedscan(*command, "--metrics", port), f"--metrics {port}: port {port} of 127.0.0.1 cannot be had")
    refused(fedscan(*words, "--metrics", "gone.invalid:9464"), "port 9464 of gone.invalid cannot be had")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "east/join.log").exists()
