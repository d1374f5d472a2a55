"""`umbel ledger`: look into a privacy ledger, and go on after its newest lines were lost."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UmbelError
from umbel.commands import Format, FormatOption, PlainCommand, print_json

commands = typer.Typer(help="Look into a privacy ledger; restore one.", no_args_is_help=True, rich_markup_mode=None)


@commands.command("show", epilog="Example: umbel ledger show runs/first --format json", cls=PlainCommand)
def ledger_show(
    path: Annotated[Path, typer.Argument(help="A ledger, or a run folder.")],
    run: Annotated[str | None, typer.Option("--run", help="Only the rounds of this run.")] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show budget, spending and every charged round."""
    from umbel.auditing import ledger_contents

    contents = ledger_contents(path, run)
    if output is Format.JSON:
        print_json(contents)
    else:
        from umbel.console import show_ledger

        show_ledger(contents)


@commands.command("head", epilog="Example: umbel ledger head ml-1m.jsonl > remembered-head.txt", cls=PlainCommand)
def ledger_head(
    path: Annotated[Path, typer.Argument(help="A ledger, or a run folder.")],
    output: FormatOption = Format.TEXT,
) -> None:
    """Print the head, to remember for `umbel audit --anchor`."""
    from umbel.auditing import ledger_contents

    head = ledger_contents(path)["head"]
    if output is Format.JSON:
        sequence, _, digest = head.partition(":")
        print_json({"sequence": int(sequence), "head": digest})
    else:
        print(head)  # noqa: T201 (the command line's voice)


@commands.command(
    "restore",
    epilog="""\b
Examples:
  umbel ledger restore fed/server/ledger.jsonl --up-to 240 --recovery-key usb/recovery.key
Every line that anybody can have seen counts: read the newest from the nodes (`acknowledged` in status.json beside each
node's store), from a published report or from a run folder's copy, and name at least that number. Lines are numbered as
`umbel ledger head` does. It does not ask, and what it charges stays charged.""",
    cls=PlainCommand,
)
def ledger_restore(
    path: Annotated[Path, typer.Argument(help="The ledger as it was put back; its key lies beside it.")],
    *,
    up_to: Annotated[int, typer.Option(help="The last line that anybody can have seen.")],
    recovery_key: Annotated[Path, typer.Option(metavar="FILE", help="The key that was made with the ledger.")],
    noise_multiplier: Annotated[
        str | None,
        typer.Option(help="Charge each lost line as a release with this noise; by default the least of any run."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Go on with an older copy of a ledger, charging every line that is lost."""
    from umbel.restoring import lost_lines, restore

    if not yes:
        lost = lost_lines(path, up_to)
        if not sys.stdin.isatty():
            raise UmbelError("Expected a terminal to ask at, got none. Add --yes.")
        if not typer.confirm(f"Charge {lost} lines as lost releases? It cannot be undone.", err=True):
            raise UmbelError("Expected yes, got no; nothing was charged.")
    document = restore(path, up_to=up_to, noise_multiplier=noise_multiplier, recovery_key=recovery_key)
    if output is Format.JSON:
        print_json(document)
    else:
        from umbel.console import show_restored

        show_restored(document)
