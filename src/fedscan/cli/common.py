"""What all commands share: errors as sentences, tables, progress of preparing, and where results lie."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # as shells say it


def outcome(app: Callable[..., Any], arguments: list[str]) -> int:
    """Runs the app and returns its exit code; whatever the user can mend becomes one sentence on stderr.

    FEDSCAN_DEBUG=1 lets errors through with their traceback.
    """
    try:
        app(args=arguments, prog_name="fedscan", standalone_mode=True)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(bool(e.code))
    except Exception as e:
        if os.environ.get("FEDSCAN_DEBUG"):
            raise
        code, sentence = said(e)
        if not sentence:
            raise
        complain(sentence)
        return code
    return 0


def said(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for an error; no sentence for one that is a fault of fedscan's own."""
    kinds = {kind.__name__ for kind in type(error).__mro__} | set(getattr(error, "kinds", ()))  # those of a worker's
    text = " ".join(str(error).split()) or type(error).__name__
    again = rerun(*getattr(error, "again", ()))
    if "Absent" in kinds:
        return 3, f"The run has stopped: {text}. Nothing is lost; when the sites are back, go on with: {again}"
    if kinds & {"Problem", "ValueError", "Diverged", "Damaged"}:
        return 2, text
    if "MemoryError" in kinds or "DefaultCPUAllocator" in text:  # NumPy's and torch's words for it
        return 3, "This machine's memory is full: lower train.batch, data.patch or data.grid. Nothing is lost."
    if "DiskFull" in kinds:
        return 3, f"{text}, and the run goes on with: {again}"
    if kinds & {"WorkerDied", "SiteFailed"}:
        return 3, f"The run has stopped: {text}. Nothing is lost: go on with: {again}"
    if "OutOfMemoryError" in kinds:
        return 3, "The GPU's memory is full: lower train.batch, data.patch or data.grid. Nothing is lost."
    if "OperationalError" in kinds:
        locked = "another process is at work in this folder; wait for it, or choose another --out"
        return 2, locked if "locked" in text else f"the run's journal cannot be written: {text}"
    if "DatabaseError" in kinds:
        return 2, f"the run's journal is damaged ({text}): take it from a copy, or run the study again"
    if isinstance(error, OSError):
        what = error.strerror or text
        return 2, f"{error.filename}: {what[:1].lower()}{what[1:]}" if error.filename else text
    return 1, ""


def complain(sentence: str) -> None:
    """One sentence on stderr."""
    print(f"fedscan: {sentence}", file=sys.stderr)


def rerun(*add: str) -> str:
    """The command as it was given, to be given again with these words added."""
    words = [word for word in sys.argv[1:] if word not in add]
    return shlex.join(["fedscan", *words, *add])


def interrupted(*add: str) -> int:
    """Says, after Ctrl-C, that nothing is lost and how to go on; returns the exit code."""
    complain(f"stopped. Nothing is lost: go on with\n  {rerun(*add)}")
    return INTERRUPTED


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table as plain text: columns aligned, numbers to the right; nothing is cut off."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    right = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(columns))]
    for line in (list(columns), ["-" * width for width in widths], *cells):
        padded = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)]
        print("  ".join(padded).rstrip())


def print_warnings(sentences: Iterable[str]) -> None:
    """What must be known to read the table above."""
    for sentence in sentences:
        print(f"warning: {sentence}")


def print_json(tree: Any) -> None:
    """A tree as JSON, for other programs; a number that is not defined is null."""
    print(json.dumps(plain(tree), indent=1, ensure_ascii=False, allow_nan=False))


def plain(tree: Any) -> Any:
    """The tree as JSON can hold it: NaN becomes null, paths and types become text."""
    if isinstance(tree, Mapping):
        return {str(k): plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(v) for v in tree]
    if isinstance(tree, float):
        return tree if tree == tree and abs(tree) != float("inf") else None
    return tree if tree is None or isinstance(tree, str | int | bool) else str(tree)


def progress(what: str, done: int, total: int) -> None:
    """What is being done before and after the rounds: one line that changes on a terminal, else a line per kind."""
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{what}: {done}/{total}   ", end=end, file=sys.stderr, flush=True)
    elif done == 0:
        print(f"{what}: {total}" if total > 2 else what, file=sys.stderr, flush=True)


def quiet_while(show: Any) -> Callable[[str, int, int], None]:
    """``progress``, silent while a live table holds the terminal."""
    return lambda what, done, total: None if show.live else progress(what, done, total)


def where(**paths: Path | str) -> None:
    """Where things lie, at the end of a command."""
    width = max(8, *(len(name) + 2 for name in paths))
    for name, path in paths.items():
        print(f"{name:<{width}}{path}")
