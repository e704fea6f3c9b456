"""Sites seen through something that adds to what is asked or answered, so that any round can be told more."""

from collections.abc import Callable, Mapping, Sequence

import torch

from fedscan.method import Message, Question, Replies, Sites, Tree


class Around:
    """Keeps the promise of ``Sites`` by handing everything on. Subclasses change ``ask_each``, and with it ``ask``."""

    def __init__(self, sites: Sites) -> None:
        self.sites, self.names = sites, sites.names

    def ask(self, question: Question, message: Message, *, to: Sequence[str] | None = None, need: int = 1) -> Replies:
        """Put one question to many sites and wait for the answers."""
        return self.ask_each(question, dict.fromkeys(self.names if to is None else to, message), need=need)

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        """The same question, with a different message for each site."""
        return self.sites.ask_each(question, messages, need=need)

    def start(self, question: Question, messages: Mapping[str, Message]) -> None:
        """Put a question and do not wait."""
        self.sites.start(question, messages)

    def next(self) -> tuple[str, Tree]:
        """The next answer to arrive of those started."""
        return self.sites.next()

    @property
    def busy(self) -> tuple[str, ...]:
        """Sites that were asked with ``start`` and have not answered."""
        return self.sites.busy

    def random(self, label: str) -> torch.Generator:
        """A generator for the server, the same whenever this round is run."""
        return self.sites.random(label)

    def once(self, label: str, make: Callable[[], Tree]) -> Tree:
        """Heavy work at the server, done once."""
        return self.sites.once(label, make)
