"""What all commands of the command line share: the format option, help that reads well, JSON on stdout."""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import click
import typer


class Format(StrEnum):
    """How results are written on stdout."""

    TEXT = "text"
    JSON = "json"


class PlainCommand(typer.core.TyperCommand):
    """A command whose help has no backslashes: typer escapes brackets for markup, which is off here."""

    def get_help(self, ctx: click.Context) -> str:
        """The help as it is read."""
        return super().get_help(ctx).replace("\\[", "[")


FormatOption = Annotated[
    Format, typer.Option("--format", show_default=False, help="For people (default), or one JSON object.")
]


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(document, indent=1, allow_nan=False))  # noqa: T201 (the command line's voice)
