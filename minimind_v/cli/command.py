"""A command that answers wrong words: the nearest right one, an option that was given twice, a word too many."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand

from minimind_v.core.errors import UsageError, nearest, unusable

CHOICES = re.compile(r"(?:Value error, )?('(?P<word>[^']*)' is not one of (?P<choices>.+?))\.?$")


class Command(TyperCommand):
    """A command of `mmv`."""

    # Whoever gives one of these twice wants both, and would get the last one without a word.
    once: tuple[str, ...] = ("model", "data", "images", "init", "config")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in pairwise(["", *args]):
            if trouble := unusable(word):
                option = word.partition("=")[0] if word.startswith("--") else before if before.startswith("-") else ""
                raise UsageError(f"{option or 'an argument'} {trouble}: {word!r}")
        if not {"-h", "--help"} & set(args):
            values, extra, order = self.make_parser(ctx).parse_args(args=list(args))
            for param, times in Counter(order).items():
                if param.name in self.once and times > 1 and not getattr(param, "multiple", False):
                    option = max(param.opts, key=len)
                    raise UsageError(f"{option} was given {times} times, and only one counts: run the command for each")
            if extra:
                raise UsageError(self.too_many(values, extra))
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if found := CHOICES.search(error.message):
                choices = re.findall(r"'([^']*)'", found["choices"])
                error.message = f"{found[1]}{nearest(found['word'], choices)}"
            raise

    def too_many(self, values: dict[str, Any], extra: Sequence[str]) -> str:
        """What to say about words that are too many; `values` are those of the options, by name."""
        return f"{' '.join(map(repr, extra))}: too many words — several words that are one need quotes"
