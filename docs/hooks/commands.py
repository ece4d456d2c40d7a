"""A hook of MkDocs: writes the reference of the command line from the parser of ``darktrt`` itself."""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator
from typing import Any

from darktrt.cli.commands import parser

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, "\n\n".join(commands(parser()))) if MARK in markdown else markdown


def commands(parser: argparse.ArgumentParser, help_: str = "") -> Iterator[str]:
    """A section for each command, those of two words behind their first; commands without a help text are internal."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if help_:
        yield section(parser, groups)
    for group in groups:
        for choice in group._choices_actions:
            if choice.help and choice.help is not argparse.SUPPRESS:
                yield from commands(group.choices[choice.dest], choice.help)


def section(parser: argparse.ArgumentParser, groups: list[Any]) -> str:
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    parts = [f"## {parser.prog}", str(parser.description or ""), f"```text\n{usage}\n```"]
    actions = [action for action in parser._actions if action not in groups and "--help" not in action.option_strings]
    rows = [f"| {names(action)} | {meaning(parser, action)} |" for action in actions if action.help is not argparse.SUPPRESS]
    if rows:
        parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    if parser.epilog:
        parts.append(f"```text\n{parser.epilog}\n```")
    return "\n\n".join(parts)


def names(action: argparse.Action) -> str:
    return ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"


def meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of an argument, safe in the cell of a Markdown table."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("*", "\\*") + choices
