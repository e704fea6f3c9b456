"""serve, join, status and stop as users give them: the commands of the page, in processes of their own."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from commands import Command, Said, refused
from fedscan.cli import between
from fedscan.consortium.joining import hold_alone
from fedscan.consortium.status import Reached
from fedscan.engines.kept import free_port
from fedscan.ledger import read_record

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "consortium.md").read_text(encoding="utf-8")
PATIENCE = 500.0  # seconds for what takes 5 on an idle machine
LEFT = "left: what was answered is kept, and joining again goes on with it"


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(start: str, end: str) -> list[list[str]]:
    """The commands of the page from one heading to another, as words."""
    part = PAGE[PAGE.index(f"\n## {start}") : PAGE.index(f"\n## {end}")]
    return [shlex.split(line)[1:] for block in blocks("sh", part) for line in block.splitlines()]


class Process:
    """A command in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDSCAN_CACHE": str(folder / "cache")}
        self.of = subprocess.Popen(
            [sys.executable, "-m", "fedscan", *words], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def ended(self) -> Said:
        out, err = self.of.communicate(timeout=PATIENCE)
        assert "Traceback" not in out + err, err
        return Said(self.of.returncode, out, err)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts commands; whatever still runs at the end is ended."""
    made: list[Process] = []

    def process(*words: str) -> Process:
        made.append(Process(tmp_path, *words))
        return made[-1]

    yield process
    for one in made:
        if one.of.poll() is None:
            one.of.kill()
            one.of.communicate()


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"waited for {what} in vain"
        time.sleep(0.1)


def metrics(port: int) -> set[str]:
    """The lines of metrics that are shown at a port; none where there is nobody."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as said:
        return set(said.read().decode().splitlines())
    return set()


def prepared(fedscan: Command, folder: Path) -> None:
    """Steps 1 to 4 of the page."""
    exec(compile(blocks("python")[0], "scans.py", "exec"), {})  # our own page, in a test
    (folder / "study.toml").write_text(blocks("toml")[0])
    for words in commands("2. Found the consortium", "5. Run it"):
        said = fedscan(*words)
        assert (said.code, said.err) == (0, ""), words


@pytest.mark.slow
def test_the_page_from_nothing_to_a_report(fedscan: Command, start: Callable[..., Process], tmp_path: Path) -> None:
    prepared(fedscan, tmp_path)
    east, west, serve = commands("5. Run it", "Between real machines")
    log = tmp_path / "sites/east/join.log"

    def status() -> dict[str, object]:
        return dict(json.loads(fedscan("status", "run", "--json").out))

    def states() -> list[str]:
        told = status() if (tmp_path / "run/status.json").exists() else {"sites": {}}
        return [site["state"] for site in told["sites"].values()]  # type: ignore[attr-defined]

    # one hospital is there, and one is waited for
    port, own = free_port(), free_port()
    first, asking = start(*east, "--json", "--metrics", str(own)), start(*serve)
    until(lambda: states() == ["is there, and agrees", "is waited for: nobody is there yet"], "the first hospital")
    told = status()
    assert (told["state"], told["round"], told["alive"]) == ("waits for west", 0, True)
    assert {"fedscan_join_waits_for_yes 0.0", "fedscan_join_answers_total 0.0"} <= metrics(own)
    assert re.search(r"^west +is waited for: .* +\d+ s$", fedscan("status", "run").out, re.M)
    refused(fedscan(*east), "another `fedscan join` is at work in sites/east: one at a time answers for a hospital.")
    refused(fedscan(*serve), "another `fedscan serve` is at work on the run in run: wait for it")

    # the coordinator is stopped in the middle, and a hospital leaves; both come back
    second = start(*west)
    west_log = tmp_path / "sites/west/join.log"
    until(lambda: west_log.exists() and "learn in round 1: answered" in west_log.read_text(), "round 1")
    assert fedscan("stop", "run").out.startswith("it is told to stop")
    said = asking.ended()
    assert (said.code, said.out) == (130, "")
    assert said.err.endswith(f"stopped. Nothing is lost: go on with\n  {shlex.join(['fedscan', *serve, '--resume'])}\n")
    assert (status()["state"], status()["alive"]) == ("stopped", False)
    assert re.match(r"stopped, round [1-4] \(nobody is at work on it\)\n", fedscan("status", "run").out)
    refused(fedscan("stop", "run"), "nobody is at work on run: it stands still")
    second.of.send_signal(signal.SIGINT)
    said = second.ended()
    assert (said.code, said.out.splitlines()[-1][9:]) == (130, LEFT)
    asking, again = start(*serve, "--resume", "--metrics", str(port)), start(*west)

    # all come to the end, which is shown to whoever reads the metrics
    seen: set[str] = set()
    until(lambda: seen.update(metrics(port)) or asking.of.poll() is not None, "the end")
    assert 'fedscan_serve_state{state="ended"} 1.0' in seen
    said = asking.ended()
    assert said.code == 0, said.err
    assert re.search(r"^mean of sites +\d+ +[01]\.\d\d", said.out, re.M)
    assert re.search(r"^report +run/report.html$", said.out, re.M)
    until(lambda: not metrics(own), "the end of east, which waits to be read")
    for one in (first, again):
        assert one.ended().code == 0
    assert fedscan("status", "run").out.startswith("ended, round 4\n")
    refused(fedscan("stop", "run"), "nobody is at work on run: it has ended")
    record = read_record(tmp_path / "run")
    assert {turn.status for turn in record.turns} == {"answered"}
    assert "than its signed approval says" in (tmp_path / "run/report.html").read_text()

    # the log is as the page says
    known = re.findall(r"^\| `(.+?)` \|", (DOCS / "between.md").read_text(encoding="utf-8"), re.M)
    patterns = [re.sub(r"[A-Z]{3,}", ".+", re.escape(one)) for one in known]
    events = [json.loads(line) for path in (log, west_log) for line in path.read_text().splitlines()]
    assert all(set(event) == {"time", "event"} for event in events)
    kinds = {next(p for p in patterns if re.fullmatch(p, event["event"])) for event in events}
    late = re.escape("not heard: ") + ".+"  # what the stopped coordinator had said last may come after its end
    assert len(kinds - {late}) == 6  # but refusals and faults
    assert log.stat().st_mode & 0o077 == 0


def test_who_cannot_take_part_is_told_why(fedscan: Command, tmp_path: Path) -> None:
    prepared(fedscan, tmp_path)
    east, west, serve = commands("5. Run it", "Between real machines")

    def at(folder: str) -> list[str]:
        return ["join", "--engine", "loopback", "--folder", folder]

    mine = "desk is the folder of a coordinator: only a hospital decides on studies, and joins them."
    for words in (at("desk"), ["site", "policy", "--folder", "desk"], ["site", "approvals", "--folder", "desk"]):
        refused(fedscan(*words), mine)
    assert not (tmp_path / "desk/policy.toml").exists()
    refused(fedscan("join", "--folder", "sites/east"), "say by --server where the coordinator is, such as")
    refused(fedscan("join", "--folder", "sites/east", "--server", "here"), "'here' is no address: HOST:PORT was meant")
    refused(fedscan(*at("nowhere")), "nowhere is not a member's folder: make one with")
    folder = serve.index("--folder") + 1
    wrong = [*serve[:folder], "sites/east", *serve[folder + 1 :]]
    refused(fedscan(*wrong), "sites/east is the folder of a site: a study comes from the coordinator's.")
    refused(fedscan(*serve[:-4], "--out", "run"), "--engine loopback reaches hospitals on this machine only")
    for where in ("nowhere", "scans", "sites/east"):
        said = fedscan(*serve[:-4], "--sites", where, "--out", "run")
        refused(said, f"{where} holds no folder of east or west: say by --sites where they lie.")
    refused(fedscan(*serve, "--resume"), "run holds no run to go on with")
    yes = ["site", "approve", "study.toml", "--folder", "sites/east", "--until"]
    refused(fedscan(*yes, "9999-12-31"), "--until 9999-12-31: a day was meant, such as")
    refused(fedscan("status", "run"), "run holds no run between hospitals")
    refused(fedscan("stop", "run"), "run holds no run between hospitals")
    refused(fedscan(*serve, "--set", "data.sites=['north']"), "north")

    # a study that nobody has said yes to; what it asks is shown
    (tmp_path / "other.toml").write_text(blocks("toml")[0].replace("rounds = 4", "rounds = 5"))
    said = fedscan(*east, "other.toml")
    refused(said, "'balls' is proposed here (nobody has decided on it): read what is asked, and agree with `fedscan")
    assert "desk asks east to take part, together with west." in said.out
    assert "which was approved last:\n- 1 more round\n- train.rounds is 5, was 4\n" in said.out
    assert fedscan(*east, "other.toml", "--json").out == ""
    policy = tmp_path / "sites/east/policy.toml"
    allows = policy.read_text()
    policy.write_text(allows.replace("least_cases = 20", "least_cases = 30"))
    refused(fedscan(*east), "your policy refuses it: You have 24 cases that can be used, and the policy asks for at")
    policy.write_text(allows)
    fedscan("site", "reject", "study.toml", "--folder", "sites/west", "--why", "no time")
    refused(fedscan(*west, "study.toml"), "'balls' is rejected here (no time)")
    refused(fedscan(*west), "west has agreed to no study yet")

    # who is no member: not yet, or no more
    fedscan("site", "init", "north", "--folder", "sites/north")
    refused(fedscan(*at("sites/north"), "study.toml"), "sites/north has no certificate.pem yet: send request.csr to")
    fedscan("consortium", "revoke", "east", "--why", "the key was stolen", "--folder", "root")
    assert fedscan("site", "import", "root/roster.json", "--folder", "sites/east").code == 2
    assert fedscan("site", "import", "root/roster.json", "--folder", "desk").code == 0


def test_who_sits_at_a_terminal_is_asked_for_a_yes(
    fedscan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(fedscan, tmp_path)
    (tmp_path / "other.toml").write_text(blocks("toml")[0].replace("rounds = 4", "rounds = 5"))
    east = [*commands("5. Run it", "Between real machines")[0], "other.toml"]
    signed = tmp_path / "sites/east/approvals"
    monkeypatch.setattr(between, "at_terminal", lambda: True)
    busy = "another `fedscan join` is at work in sites/east"
    with hold_alone(tmp_path / "sites/east"):  # so that it goes no further than the yes
        for typed in ("n\n", "\n", "what?\nno\n"):
            monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
            said = fedscan(*east)
            refused(said, "'balls' is proposed here (nobody has decided on it): read what is asked, and agree with")
            assert "It is proposed: nobody has decided on it.\n\nDoes east agree to exactly this? [y/N]:" in said.out
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # Ctrl-C, or Ctrl-D
        assert fedscan(*east).code == 130
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
        refused(fedscan(*east, "--json"), "read what is asked, and agree with")  # a program is not asked
        assert len(list(signed.iterdir())) == 1
        refused(fedscan(*east), busy)
        assert len(list(signed.iterdir())) == 2
        said = fedscan(*east)  # it has agreed, and is told again what to
        refused(said, busy)
        assert "Asked once a round, in 5 rounds." in said.out
        assert "It is approved: by east on" in said.out
        assert "[y/N]" not in said.out
        policy = tmp_path / "sites/east/policy.toml"
        policy.write_text(policy.read_text().replace("least_cases = 20", "least_cases = 30"))
        refused(fedscan(*east), "your policy refuses it")  # no yes can be given to that


def test_a_coordinator_that_is_not_reached_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now, silent = [1000.0], list[float | None]([None])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    reached = Reached("desk at fl.hospital.org:8002", said.append, lambda: silent[0])
    lost = "desk at fl.hospital.org:8002 is not reached, for {} s: it is tried again until it is there, or Ctrl-C"
    for at, silence, sentences in (
        (1044, None, []), (1046, None, [lost.format(46)]), (1100, None, []), (1101, 0.2, ["{} is reached"]),
        (1200, 30.0, []), (1216, 46.0, [lost.format(46)]), (1300, 130.0, []), (1301, 1.0, ["{} is reached"]),
    ):  # fmt: skip
        now[0], silent[0] = at, silence
        reached.look()
        assert said == [one.format(reached.who) for one in sentences], at
        said.clear()
    reached.since = 1301  # a new start, long after an earlier one was heard
    now[0], silent[0] = 1302, 9999.0
    reached.look()
    assert said == []


def test_a_hospital_that_failed_is_a_sentence_and_can_be_gone_on_with() -> None:
    from fedscan.cli.common import said
    from fedscan.engines.remote import SiteFailed

    code, sentence = said(SiteFailed("learn in round 1 failed at west (ZeroDivisionError): its own log says why"))
    assert code == 3
    assert "failed at west (ZeroDivisionError): its own log says why. Nothing is lost: go on with" in sentence


def test_the_page_of_exit_codes_has_each_code_that_commands_end_with() -> None:
    """Codes stand in the commands as ``Exit(N)``, and in ``common`` as what ``said`` and ``interrupted`` return."""
    from fedscan.cli import common

    written = {common.INTERRUPTED, 0}
    for path in Path(common.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"Exit\(code=|os\._exit|sys\.exit\((?!outcome)", text), f"{path.name} ends in another way"
        written |= {int(code) for code in re.findall(r"typer\.Exit\((\d+)\)", text)}
        if path.name == "common.py":
            written |= {int(code) for code in re.findall(r"^ {4,8}return (\d+)(?:,|$)", text, re.M)}
    page = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    assert written == {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}
    assert written == {0, 1, 2, 3, 130}
