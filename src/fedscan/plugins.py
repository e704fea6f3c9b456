"""Methods, models and tasks that installed packages bring, each with where it comes from, for the study's hash.

Nothing is imported because a message or a study's file says so: only entry points of installed packages are looked at.
"""

import hashlib
import inspect
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """The installed distribution that something comes from, its version, and the SHA-256 of its source."""

    package: str = "fedscan"
    version: str = ""
    digest: str = ""


OWN = Origin()


def offered(group: str) -> list[EntryPoint]:
    """The entry points of a group ("fedscan.methods", "fedscan.models", "fedscan.tasks"), by name."""
    return sorted(entry_points(group=group), key=lambda point: point.name)


def loaded(point: EntryPoint) -> Any:
    """What an entry point names. ValueError, in one sentence, where its package cannot be imported or lacks it."""
    try:
        return point.load()
    except Exception as e:  # whatever an import of somebody else's code raises
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"the plug-in {point.name!r} ({point.value}) cannot be loaded: {why}") from e


def origin_of(point: EntryPoint, made_by: Any) -> Origin:
    """Where the function ``made_by`` comes from, which an entry point offers."""
    package, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
    return Origin(package, version, digest_of(made_by))


def digest_of(made_by: Any) -> str:
    """SHA-256 of the source that a function is in: its file, or all Python files of its package, named in order."""
    source = inspect.getsourcefile(made_by)
    if not source:
        return ""
    top = getattr(sys.modules.get(made_by.__module__.partition(".")[0]), "__file__", None)
    if not top or Path(top).name != "__init__.py":
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    sha, folder = hashlib.sha256(), Path(top).parent
    for path in sorted(folder.rglob("*.py")):
        sha.update(f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return sha.hexdigest()
