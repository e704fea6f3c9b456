"""What a study asks, and how it differs from another, in words for those who have to say yes or no."""

from collections.abc import Iterator

from fedscan.consortium.asks import Asks, Question
from fedscan.method import PRIVACY

SHOWN = 12  # settings that differ, at most, before the rest is only counted


def size(count: float) -> str:
    """Bytes as B, kB, MB or GB (powers of 1000), to three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def often(n: int) -> str:
    """How often: "once", "twice", "3 times"."""
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def words(asks: Asks) -> str:
    """A page on what a study asks of a hospital: by whom, what for, what leaves, how large, how often."""
    others = [name for name in asks.sites if name != asks.hospital]
    with_ = f"together with {', '.join(others)}" if others else "alone"
    lines = [
        f"Study {asks.study!r}, {asks.hash[:12]}",
        "",
        f"{asks.coordinator} asks {asks.hospital} to take part, {with_}.",
        f"Task: {asks.task} of {', '.join(asks.labels) or 'what the labels mark'}, by the network {asks.model!r}.",
        f"Method: {asks.title} ({asks.method}). Its card says what travels: {asks.travels}.",
        "(P stands for how many numbers the network has.)",
        f"Rounds: {asks.rounds}. Your cases that can be used: {asks.cases}; the scans and label maps stay with you.",
        f"The most telling class of data that would leave: {asks.privacy}.",
        "",
        "What is asked of you, and nothing else:",
    ]
    for question in asks.questions:
        lines += ["", *of_question(asks.method, question)]
    return "\n".join([*lines, "", *totals(asks)]) + "\n"


def of_question(method: str, question: Question) -> Iterator[str]:
    """A question in lines: its name and class, each entry of its answer, how large and how often."""
    yield f"  {method}:{question.name} (class: {question.privacy})"
    yield "    An answer holds, and can hold no more than"
    for part in question.leaves:
        name = f"{part.name}: " if part.name else ""
        yield f"    - {name}{part.what}; at most {size(part.nbytes)}"
    about = "at most" if question.declared else "about"
    yield f"    An answer has at most {size(question.up)}; you are sent {about} {size(question.down)}."
    yield f"    Asked {how_often(question)}."
    if question.passed:
        yield "    YOUR ANSWER IS PASSED ON TO OTHER HOSPITALS AS IT CAME."
    if question.steps is not None:
        yield f"    About {question.steps} optimiser steps on your cases stand behind an answer."


def how_often(question: Question) -> str:
    """ "once a round, in 10 rounds, and once at the end"; "up to 3 times" where who answers sooner is asked more."""
    found = []
    if question.times and question.rounds:
        rounds = "1 round" if question.rounds == 1 else f"{question.rounds} rounds"
        up_to = "up to " if question.open and question.times > 1 else ""
        found.append(f"{up_to}{often(question.times)} a round, in {rounds}")
    if question.last:
        found.append(f"{often(question.last)} at the end")
    return ", and ".join(found) or "never, as the method goes"


def totals(asks: Asks) -> list[str]:
    """What leaves and comes in a round and in the whole study."""
    up = sum(q.up * (q.times * q.rounds + q.last) for q in asks.questions)
    down = sum(q.down * (q.times * q.rounds + q.last) for q in asks.questions)
    about = "at most" if all(q.declared for q in asks.questions) else "about"
    return [
        f"In a round at most {size(asks.round_up)} leave you, and {about} {size(asks.round_down)} come.",
        f"In the whole study at most {size(up)} leave you, and {about} {size(down)} come.",
        "Scores name cases and patients by codes that only you can trace back.",
    ]


def difference(old: Asks, new: Asks) -> list[str]:
    """How a study asks otherwise than another: sentences in plain words, what leaves first; empty where it does not."""
    found = [*classes(old, new), *of_questions(old, new), *amounts(old, new)]
    for what in ("coordinator", "hospital", "task", "method", "model"):
        before, after = getattr(old, what), getattr(new, what)
        if before != after:
            found.append(f"the {what} is {after}, and was {before}")
    found += [f"{name} takes part, and did not before" for name in sorted(set(new.sites) - set(old.sites))]
    found += [f"{name} takes part no more" for name in sorted(set(old.sites) - set(new.sites))]
    if old.labels != new.labels:
        found.append(f"the labels are {', '.join(new.labels)}, and were {', '.join(old.labels)}")
    if old.version != new.version:
        found.append(f"fedscan is {new.version}, and was {old.version}")
    found += settings(old, new)
    if old.hash != new.hash and not found:
        found.append("what is asked is the same, and a package that the study uses is not")
    return found


def classes(old: Asks, new: Asks) -> list[str]:
    """Classes of data that would leave and did not, or leave no more."""
    before, after = (
        {q.privacy for q in asks.questions} | {"weights" for q in asks.questions if q.weights} for asks in (old, new)
    )
    found = [f"{name} would leave, which did not before" for name in PRIVACY if name in after - before]
    return found + [f"{name} would leave no more" for name in PRIVACY if name in before - after]


def of_questions(old: Asks, new: Asks) -> list[str]:
    """Questions that are new, gone, or whose answers hold other things than before."""
    before, after = ({q.name: q for q in asks.questions} for asks in (old, new))
    found = [f"{name!r} would be asked, which was not before" for name in after if name not in before]
    found += [f"{name!r} is asked no more" for name in before if name not in after]
    for name in (name for name in after if name in before):
        was, is_ = before[name], after[name]
        held, holds = ({part.name: part.what for part in q.leaves if part.name} for q in (was, is_))
        found += [f"an answer to {name!r} would hold {key} ({holds[key]})" for key in holds if key not in held]
        found += [f"an answer to {name!r} holds no {key} any more" for key in held if key not in holds]
        found += [
            f"{key} in an answer to {name!r} is {holds[key]}, and was {held[key]}"
            for key in holds
            if key in held and held[key] != holds[key]
        ]
        if is_.passed and not was.passed:
            found.append(f"answers to {name!r} would be passed on to other hospitals as they come, and were not before")
        if was.passed and not is_.passed:
            found.append(f"answers to {name!r} are passed on to other hospitals no more")
        if (was.times, was.last) != (is_.times, is_.last):
            found.append(f"{name!r} is asked {how_often(is_)}, and was {how_often(was)}")
        if was.steps != is_.steps and is_.steps is not None:
            found.append(f"{is_.steps} optimiser steps stand behind an answer to {name!r}, and {was.steps} did")
    return found


def amounts(old: Asks, new: Asks) -> list[str]:
    """Rounds, bytes and cases that are more or fewer."""
    found = []
    if more := new.rounds - old.rounds:
        found.append(f"{abs(more)} {'more' if more > 0 else 'fewer'} round{'' if abs(more) == 1 else 's'}")
    for what, before, after in (("leave", old.round_up, new.round_up), ("come", old.round_down, new.round_down)):
        if before != after:
            found.append(f"at most {size(after)} {what} in a round, where it was {size(before)}")
    if old.cases != new.cases:
        found.append(f"you have {new.cases} cases, and had {old.cases}")
    return found


def settings(old: Asks, new: Asks) -> list[str]:
    """Values of the study that differ: the first few are shown, the rest is counted.

    Of another method or network, whose settings are all others, none is shown.
    """
    gone = object()
    others = tuple(f"{what}." for what in ("method", "model") if getattr(old, what) != getattr(new, what))
    keys = sorted(key for key in old.settings.keys() | new.settings.keys() if not key.startswith(others))
    found = []
    for key in keys:
        before, after = old.settings.get(key, gone), new.settings.get(key, gone)
        if (type(before), before) != (type(after), after):
            is_ = "not set any more" if after is gone else repr(after)
            found.append(f"{key} is {is_}" + (", new" if before is gone else f", was {before!r}"))
    left = len(found) - SHOWN
    return found[:SHOWN] + ([f"and {left} more settings differ"] if left > 0 else [])
