"""Writes the pages that follow from code: methods, models, commands and the keys of a study file.

    python docs/make.py            writes them anew
    python docs/make.py --check    says which are stale, and exits with 1 if one is

What a key or a hyperparameter means stands in ``meanings.py``; its type, its default and what is allowed come from the
code. A key without a meaning, or a meaning without a key, is an error, so that the pages cannot fall behind.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

HERE = Path(__file__).parent
NOTICE = "<!-- Written by docs/make.py from the code. Change the code, or docs/meanings.py, and run `make docs`. -->\n"
sys.path.insert(0, str(HERE))

import meanings  # noqa: E402


def main() -> int:
    """Writes the pages, or says which are stale."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, make in PAGES.items():
        path, text = HERE / name, NOTICE + "\n" + make().rstrip() + "\n"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        said = "stale, run `make docs`" if check else "written"
        print(f"docs: {', '.join(stale)} {said}")
    return 1 if check and stale else 0


# -- pages -----------------------------------------------------------------------------------------------------------


def methods_page() -> str:
    """A table of all methods, then a section for each."""
    from fedscan.methods.registry import methods

    entries = {name: entry for name, entry in methods().items() if entry.package == "fedscan"}
    rows = [
        (f"[`{name}`](#{name})", e.card.family, cell(e.card.differs), e.card.privacy) for name, e in entries.items()
    ]
    parts = [
        "# Methods",
        f"{len(entries)} methods, each one function with a card. `fedscan methods` prints the table and `fedscan show "
        "NAME` a card. How to add one: [write a method](write-a-method.md).",
        table(("method", "family", "what differs", "what leaves a site"), rows),
        "*P* is the number of entries of the network's leaves ([words](README.md#words)), so 4*P* their bytes as "
        "float32; *P'* leaves out what stays at home. “What leaves a site” is the most telling class of data in an "
        "answer, and weights may leave beside it: see "
        "[what leaves a hospital](privacy.md).",
    ]
    parts += [method_section(entry) for entry in entries.values()]
    unused("METHOD", meanings.METHOD, {key for e in entries.values() for key in options_of(e)})
    return "\n\n".join(parts)


def method_section(entry: Any) -> str:
    """One method's card and hyperparameters."""
    c = entry.card
    paper = f"[{c.paper}]({c.url})" if c.url else c.paper
    facts = [
        ("paper", paper),
        ("equation", f"`{c.equation}`"),
        ("what differs", c.differs),
        ("what travels", c.travels),
        ("most telling data", c.privacy),
        ("normalisation layers", c.normalisation),
        ("optimiser's moments", f"{c.moments}, where the study does not say"),
        ("needs", c.needs),
        ("reduces to", reduction(c.reduces)),
        ("network", f"[`{c.model}`](models.md#{c.model}), where the study names none" if c.model else ""),
    ]
    parts = [f"## {c.name}", f"**{c.title}.** In a study file: `[method]`, `name = {json.dumps(c.name)}`."]
    parts.append("\n".join(f"- **{what}:** {sentence_end(said)}" for what, said in facts if said))
    found = options_of(entry)
    if found:
        rows = [
            (f"`{name}`", kind, value(default), meaning("METHOD", meanings.METHOD, (c.name, name)))
            for (_, name), (kind, default) in found.items()
        ]
        parts.append(table(("hyperparameter", "what may stand there", "default", "meaning"), rows))
    else:
        parts.append("No hyperparameters.")
    return "\n\n".join(parts)


def options_of(entry: Any) -> dict[tuple[str, str], tuple[str, Any]]:
    """Every hyperparameter of a method: what may stand there, and its default."""
    from fedscan.studyfile.places import words
    from fedscan.studyfile.sections import writable

    return {
        (entry.card.name, name): (plain(words(kind)), default)
        for name, (kind, default) in entry.options.items()
        if writable(kind)
    }


def reduction(rule: Any) -> str:
    """When a method is another one, bit for bit."""
    if rule is None:
        return ""
    own = [f"{k} = {json.dumps(v)}" for k, v in (*rule.own.items(), *rule.step.items())]
    its = [f"{k} = {json.dumps(v)}" for k, v in rule.its.items()]
    with_its = f" with `{', '.join(its)}`" if its else ""
    at = f", at `{', '.join(own)}`" if own else ""
    alone = ", with a single site" if rule.alone else ""
    return f"[`{rule.to}`](#{rule.to}){with_its}{at}{alone}: bit for bit, held by a test"


def models_page() -> str:
    """A table of all networks, then a section for each."""
    from fedscan.models.registry import models

    cards = models()
    rows = [(f"[`{n}`](#{n})", cell(c.summary), ", ".join(f"`{p}`" for p in c.presets)) for n, c in cards.items()]
    parts = [
        "# Models",
        "The networks that a study can name in `[model]`. `fedscan models` prints this table. The number of sequences "
        "and of labels comes from the data; everything else is an option, and a preset sets several at once.",
        table(("model", "what it is", "presets"), rows),
    ]
    for name, c in cards.items():
        paper = f"[{c.paper}]({c.url})" if c.url else c.paper
        parts += [f"## {name}", f"{sentence_end(c.summary)} {sentence_end(paper)}"]
        options = [
            (f"`{key}`", c.allowed(key), value(default), meaning("MODEL", meanings.MODEL, (name, key)))
            for key, default in c.options.items()
        ]
        parts.append(table(("option", "what may stand there", "default", "meaning"), options))
        sets = [
            (f"`{p}`", "; ".join(f"`{k} = {value(v).strip('`')}`" for k, v in s.items()) or "the defaults")
            for p, s in c.presets.items()
        ]
        if sets:
            parts.append(table(("preset", "sets"), sets))
    unused("MODEL", meanings.MODEL, {(name, key) for name, c in cards.items() for key in c.options})
    return "\n\n".join(parts)


def study_page() -> str:
    """Every key of a study file."""
    from fedscan.studyfile.places import words
    from fedscan.studyfile.sections import TABLES, Top

    parts = [meanings.STUDY_INTRO.strip()]
    known = set()
    for name, model in {"": Top, **TABLES}.items():
        parts.append(f"## [{name}]" if name else "## Outside the tables")
        rows = []
        for key, field in model.model_fields.items():
            known.add((name, key))
            default = field.get_default(call_default_factory=True)
            rows.append(
                (f"`{key}`", plain(words(field)), value(default), meaning("STUDY", meanings.STUDY, (name, key)))
            )
        parts.append(table(("key", "what may stand there", "default", "meaning"), rows))
    parts += [sentence.strip() for sentence in meanings.FREE_TABLES]
    unused("STUDY", meanings.STUDY, known)
    return "\n\n".join(parts)


def commands_page() -> str:
    """Every command with its arguments and options, read from the functions behind the commands."""
    from fedscan.cli.commands import app

    found = list(commands(app))
    parts = [
        "# Commands",
        "What `fedscan COMMAND --help` says. What the user can mend is one sentence on stderr and exit code 2; every "
        "code has its line in [exit codes](exit-codes.md). Tables go to stdout, and with `--json` they are JSON.",
        table(
            ("command", "what it does"),
            [(f"[`fedscan {name}`](#fedscan-{name.replace(' ', '-')})", cell(first_line(f))) for name, f in found],
        ),
    ]
    for name, function in found:
        params = [written(p) for p in inspect.signature(function, eval_str=True).parameters.values()]
        must = [re.sub(r", --\S+", "", word) for word, _, default in params if default == "required"]
        some = ["[options]"] if len(must) < len(params) else []
        parts += [f"## fedscan {name}", first_line(function)]
        parts.append(f"```text\nfedscan {' '.join([name, *must, *some])}\n```")
        if params:
            rows = [(f"`{word}`", cell(said), default) for word, said, default in params]
            parts.append(table(("", "what it does", "default"), rows))
    return "\n\n".join(parts)


def commands(app: Any, above: str = "") -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command's name and the function behind it, those of groups below their group."""
    for command in app.registered_commands:
        if not command.hidden:
            yield above + (command.name or command.callback.__name__.replace("_", "-")), command.callback
    for group in app.registered_groups:
        name = f"{above}{group.name}"
        meant = f"{name} {getattr(group.typer_instance.info.cls, 'meant', '')}"  # where no command is named
        for below, function in commands(group.typer_instance, f"{name} "):
            yield name if below == meant else below, function


def written(p: inspect.Parameter) -> tuple[str, str, str]:
    """One argument or option: how it is written, what it does, and its default."""
    kind, info = p.annotation.__origin__, p.annotation.__metadata__[0]
    said, default = info.help or "", "required" if p.default is p.empty else value(p.default).replace("–", "")
    name = info.metavar or p.name.strip("_").upper()
    if type(info).__name__ == "ArgumentInfo":
        return name, said, default
    said_so = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str) and d.startswith("-")]
    options = ", ".join(said_so or [f"--{p.name.strip('_').replace('_', '-')}"])
    if isinstance(info.envvar, str):
        said = f"{cell(said)}; also `{info.envvar}` of the environment"
    if kind is bool:
        return options, said, "" if p.default is False else default
    if get_origin(kind) is Literal:
        name = "|".join(get_args(kind))
    return f"{options} {name}", said, default


def first_line(function: Callable[..., None]) -> str:
    """What a command does, in its own words."""
    return (inspect.getdoc(function) or "").splitlines()[0]


PAGES: dict[str, Callable[[], str]] = {
    "methods.md": methods_page,
    "models.md": models_page,
    "study.md": study_page,
    "commands.md": commands_page,
}


# -- words -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)


def value(default: Any) -> str:
    """A default as TOML writes it; a dash where there is none."""
    if default is None or default is inspect.Parameter.empty or repr(default) == "PydanticUndefined":
        return "–"
    if isinstance(default, float) and default not in (0.0, 1.0) and len(repr(default)) > 8:
        default = round(default, 4)
    if isinstance(default, Mapping) and not default:
        return "none"
    if isinstance(default, tuple):
        default = list(default)
    return f"`{json.dumps(default)}`"


def plain(said: str) -> str:
    """What may stand somewhere, without the comma that a sentence would need."""
    return said.rstrip(",").replace(",,", ",")


def cell(text: str) -> str:
    """Text for a cell, without its full stop."""
    return text.rstrip(".")


def sentence_end(text: str) -> str:
    """Text with one full stop."""
    return text.rstrip(".") + "."


def meaning(what: str, said: Mapping[Any, str], key: tuple[str, str]) -> str:
    """What a key means: said for this key, or for the name wherever it stands."""
    for k in (key, key[1]):
        if k in said:
            return said[k]
    raise SystemExit(f"docs: meanings.{what} says nothing of {key[1]!r} in {key[0] or 'the top'!r}")


def unused(what: str, said: Mapping[Any, str], known: set[tuple[str, str]]) -> None:
    """Stops where a meaning is said of what does not exist."""
    names = {key for _, key in known}
    for k in said:
        if k not in known and k not in names:
            raise SystemExit(f"docs: meanings.{what} speaks of {k!r}, which does not exist")


if __name__ == "__main__":
    sys.exit(main())
