"""Commands of `mmv`: help in groups, options that every command has, and an answer to a wrong word."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from minimind_v.cli.terminal import Terminal, Verbosity
from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.errors import UsageError, nearest, unusable
from minimind_v.core.export.targets import TARGETS

CHOICES = re.compile(r"(?:Value error, )?('(?P<word>[^']*)' is not one of (?P<choices>.+?))\.?$")
# Groups of options in a command's help, in this order.
REQUIRED, COMMON, ADVANCED, OUTPUT = "Required", "Common options", "Advanced options", "Output and help"
# Groups of commands in the help of `mmv`, in this order.
PIPELINE, USE, DATA, RUNS, MACHINE = "The pipeline", "Use a model", "Data", "Runs and models", "This machine"

# What stands in a help for the names of a table that extensions may add to; it is replaced when the help is shown.
POLICIES, FORMATS = "{policies}", "{formats}"
LISTED: dict[str, Callable[[], str]] = {
    POLICIES: lambda: ", ".join(FREEZE_POLICIES),
    FORMATS: lambda: "; ".join(f"{name}: {target.help}" for name, target in TARGETS.items()),
}

advanced = partial(typer.Option, rich_help_panel=ADVANCED)
output = partial(typer.Option, rich_help_panel=OUTPUT)

Verbose = Annotated[bool, output("-v", "--verbose", help="Show more detail.")]
Quiet = Annotated[bool, output("-q", "--quiet", help="Show only results and errors.")]
Debug = Annotated[bool, output("--debug", help="Show the traceback of an error.")]

Records = list[tuple[str, str]]  # names and help
Table = Mapping[str, tuple[Any, Any]]  # option → its annotation and its default
VERBOSITY: Table = {"verbose": (Verbose, False), "quiet": (Quiet, False), "debug": (Debug, False)}


class Command(TyperCommand):
    """A command of `mmv`."""

    # Options of which only the last value would count if they were given twice.
    once: tuple[str, ...] = ("model", "data", "images", "init", "config")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # the shell completes a command that is not finished
            return super().parse_args(ctx, args)
        for before, word in pairwise(["", *args]):
            if trouble := unusable(word):
                option = word.partition("=")[0] if word.startswith("--") else before if before.startswith("-") else ""
                raise UsageError(f"{option or 'an argument'} {trouble}: {word!r}")
        if not {"-h", "--help"} & set(args):
            values, extra, order = self.make_parser(ctx).parse_args(args=list(args))
            for param, times in Counter(order).items():
                option = max(param.opts, key=len) if param.param_type_name == "option" else param.name.upper()
                if param.name in self.once and times > 1 and not getattr(param, "multiple", False):
                    raise UsageError(f"{option} was given {times} times — give it once, and run the command for each")
                value = values.get(param.name)
                is_path = "Path" in str(param.type_descriptor.annotation)  # type: ignore[attr-defined]
                if is_path and "" in (value if isinstance(value, list) else [value]):
                    raise UsageError(
                        f"{option} is empty — name a file or a folder; a variable of the shell may be unset"
                    )
            if extra:
                raise UsageError(self.too_many(values, extra))
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if match := CHOICES.search(error.message):
                choices = re.findall(r"'([^']*)'", match["choices"])
                error.message = f"{match[1]}{nearest(match['word'], choices)}"
            if type(error).__name__ == "MissingParameter" and not error.message:
                error.message = _with_names(getattr(error.param, "help", None) or "").rstrip(".")
            raise

    def too_many(self, values: dict[str, Any], extra: Sequence[str]) -> str:
        """The message about arguments that the command does not take; `values` are those of the options, by name."""
        return f"{' '.join(map(repr, extra))}: too many words — put one argument of several words in quotes"

    def groups(self, ctx: Any) -> dict[str, Records]:
        """The arguments and options by group, in the order of the help."""
        return _in_groups(_options(self, ctx), (REQUIRED, COMMON, ADVANCED, OUTPUT))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(formatter, self.groups(ctx))


class Group(TyperGroup):
    """`mmv` itself, or a command with commands of its own."""

    def groups(self, ctx: Any) -> dict[str, Records]:
        """The commands, and then the options, by group, in the order of the help."""
        rows = [
            (getattr(command, "rich_help_panel", None) or "Commands", (name, command.get_short_help_str(200)))
            for name, command in ((name, self.commands[name]) for name in self.list_commands(ctx))
            if not command.hidden
        ]
        return _in_groups(rows, (PIPELINE, USE, DATA, RUNS, MACHINE)) | _in_groups(
            _options(self, ctx), (COMMON, OUTPUT)
        )

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(formatter, self.groups(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[:2] == ["train", "plan"]:
            Terminal().say("`mmv train plan` is now `mmv plan`")
            args = args[1:]
        return super().resolve_command(ctx, args)


def _options(command: Any, ctx: Any) -> list[tuple[str, tuple[str, str]]]:
    """The name and help of each option, with its group; arguments come first."""
    rows = []
    for param in sorted(command.get_params(ctx), key=lambda param: param.param_type_name != "argument"):
        group = getattr(param, "rich_help_panel", None)
        if group is None:
            general = param.name in ("help", "install_completion", "show_completion")
            group = OUTPUT if general else REQUIRED if param.required else COMMON
        if record := param.get_help_record(ctx):
            name, text = record
            rows.append((group, (name, _with_names(text))))
    return rows


def _with_names(text: str) -> str:
    """A help with the names of its table."""
    for mark, names in LISTED.items():
        text = text.replace(mark, names()) if mark in text else text
    return text


def _in_groups(rows: Sequence[tuple[str, tuple[str, str]]], order: Iterable[str]) -> dict[str, Records]:
    """The records of each group that has any: the groups of `order` first."""
    names = dict.fromkeys([*order, *(name for name, _ in rows)])
    groups = {name: [record for group, record in rows if group == name] for name in names}
    return {name: records for name, records in groups.items() if records}


def _write(formatter: Any, groups: dict[str, Records]) -> None:
    for name, records in groups.items():
        with formatter.section(name):
            formatter.write_dl(records)


def register(
    app: typer.Typer,
    name: str,
    function: Callable[..., Any],
    group: str | None = None,
    kind: type[Command] = Command,
    table: Table = MappingProxyType({}),
) -> None:
    """Add a command to an app. It also gets the options of every command, and those of `table` as `settings`."""
    signature = inspect.signature(function, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for own in signature.parameters.values():
        parameters += _parameters(table) if own.name == "settings" else [own.replace(kind=own.KEYWORD_ONLY)]
    parameters += _parameters(VERBOSITY)

    def run(**values: Any) -> Any:
        set_verbosity(**{option: values.pop(option) for option in VERBOSITY})
        if table:
            values["settings"] = {option: values.pop(option) for option in table}
        return function(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {own.name: own.annotation for own in parameters}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    app.command(name, cls=kind, rich_help_panel=group)(run)


def _parameters(table: Table) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for option, (annotation, default) in table.items()
    ]


def set_verbosity(verbose: bool, quiet: bool, debug: bool) -> None:
    """Decide how much a command shows. `--debug` is read before the options are parsed."""
    if verbose and quiet:
        raise UsageError("--verbose shows more and --quiet shows less — give one of them")
    if verbose or quiet:
        Terminal.verbosity = Verbosity.detail if verbose else Verbosity.quiet
