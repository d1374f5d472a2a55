"""`umbel provision` and `umbel doctor`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.commands import Format, FormatOption, PlainCommand, print_json

commands = typer.Typer()

_SOMETHING_FAILED = 2
_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


@commands.command(
    epilog="""\b
Examples:
  umbel provision trial --nodes 3
  umbel provision fed --nodes 20 --users-per-node 50 --host fed.example.org --config run.toml
  umbel provision fed --nodes 25
  umbel provision fed --rotate server --rotate edge-2
It can be run again at any time: what is there is kept, what is missing is made, no key is overwritten.""",
    cls=PlainCommand,
)
def provision(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New, empty, or made by this command.")],
    nodes: Annotated[int | None, typer.Option(help="How many nodes there are to be; more than there are adds.")] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of the server; devices call the first one.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Of the runs: its data are divided among the nodes, for a trial.")
    ] = None,
    users_per_node: Annotated[
        int | None, typer.Option(min=1, help="Each device has data of its own, about so many users.")
    ] = None,
    partitions: Annotated[
        int | None, typer.Option(min=1, help="Divide the data into more parts, for nodes to come.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Budget of the population for all runs; by default 8.", show_default=False)
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Of the budget; by default min(1e-6, 1/(10 users)).")] = None,
    max_nodes_per_user: Annotated[int | None, typer.Option(min=1, help="On how many nodes one user may be.")] = None,
    population: Annotated[str | None, typer.Option(help="Whose privacy the ledger counts, in words.")] = None,
    name_prefix: Annotated[str, typer.Option(help="New nodes are called so, with a number.")] = "edge",
    superlink_port: Annotated[
        int | None, typer.Option(help="Flower's, for the operator; 0 for a free one, by default 8443.")
    ] = None,
    fleet_port: Annotated[int | None, typer.Option(help="The one devices reach; by default 9443.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus', on loopback; by default 9464.")] = None,
    rotate: Annotated[
        list[str] | None, typer.Option(metavar="server|ledger|NODE", help="Renew a certificate or keys.")
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Make certificates, keys and policies of a federation."""
    from common.config import load_config
    from umbel.provision import Request
    from umbel.provision import provision as make

    document = make(
        folder,
        Request(
            nodes=nodes,
            hosts=tuple(host or ()),
            config=None if config is None else load_config(config),
            users_per_node=users_per_node,
            partitions=partitions,
            epsilon=epsilon,
            delta=delta,
            max_nodes_per_user=max_nodes_per_user,
            population=population,
            name_prefix=name_prefix,
            ports={"superlink": superlink_port, "fleet": fleet_port, "metrics": metrics_port},
            rotate=tuple(rotate or ()),
        ),
    )
    if output is Format.JSON:
        print_json(document)
    else:
        _show_provisioned(document)


@commands.command(
    epilog="""\b
Examples:
  umbel doctor fed
  umbel doctor /etc/umbel --format json
Exit codes: 0 nothing fails (warnings may be there); 2 something does, or it is no such folder.""",
    cls=PlainCommand,
)
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="DIR|NODE", help="A federation's folder, or a node's.")],
    output: FormatOption = Format.TEXT,
) -> None:
    """Examine a federation, or a node, before it is needed."""
    from umbel.doctor import doctor as examine

    document = examine(folder)
    if output is Format.JSON:
        print_json(document)
    else:
        _show_checks(document)
    raise typer.Exit(_SOMETHING_FAILED if document["failed"] else 0)


def _show_provisioned(document: Mapping[str, Any]) -> None:
    nodes, budget, certificates = document["nodes"], document["budget"], document["certificates"]
    new = [node["name"] for node in nodes if node["is_new"]]
    promised = "none: NOT PRIVATE"
    if budget["epsilon"] is not None:
        promised = f"epsilon {budget['epsilon']:g} at delta={budget['delta']:g} for each user of {budget['population']}"
    lines = [
        f"{document['folder']}: {len(nodes)} nodes with {document['users']} users"
        + (f", new: {_listed(new)}." if new else ", none new."),
        f"budget        {promised}, in all runs",
        f"server        {', '.join(document['hosts'])}; devices reach port {document['ports']['fleet']}",
        *(f"{name:13} valid until {found['expires'][:10]}" for name, found in certificates.items()),
        *(f"warning: {text}" for text in document["warnings"]),
        *_next_steps(document, new),
    ]
    _print(lines)


def _next_steps(document: Mapping[str, Any], new: list[str]) -> list[str]:
    folder = document["folder"]
    quoted = shlex.quote(folder)
    steps = [f"umbel doctor {quoted}", f"umbel up {quoted}   # to try it on this machine"]
    if new:
        steps.append(f"copy {folder}/nodes/NAME to each device, with its permissions; docs/device.md")
    if document["data"] is None:
        steps.append("have each device's owner fill in [data] in its node.toml")
    environment = shlex.quote(f"{folder}/compose.env")
    steps.append(f"docker compose --env-file {environment} --profile edge up --build   # the same in containers")
    return ["next:", *(f"  {step}" for step in steps)]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{names[0]} to {names[-1]}"


def _show_checks(document: Mapping[str, Any]) -> None:
    lines = []
    for check in document["checks"]:
        lines.append(f"{_MARKS[check['status']]} {check['name']:14} {check['message']}")
        if check["remedy"]:
            lines.append(f"{'':20}-> {check['remedy']}")
    lines.append(
        f"{document['failed']} failed, {document['warned']} to be seen to, of {len(document['checks'])} checks."
    )
    _print(lines)


def _print(lines: list[str]) -> None:
    print("\n".join(lines))  # noqa: T201 (the command line's voice)
