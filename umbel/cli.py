"""The command line: options in, one line for every error, a documented exit code out.

What a subcommand needs is imported when it runs, so that `umbel --help` is at once there.
"""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import click
import typer

from common.errors import BudgetExhausted, UmbelError
from umbel import cli_federation, cli_incremental, cli_ledger, cli_node, cli_provision
from umbel.characters import spell_out
from umbel.commands import Format, FormatOption, PlainCommand, print_json

_EXIT_CODES = """\b
Exit codes:
  0    fine; an audit: verified (no promise if it says NOT PRIVATE)
  1    a defect of umbel
  2    bad input: an option, a configuration, data, a file
  3    privacy budget exhausted, or a plan that does not fit it
  4    verification failed
  5    an audit without --public-key: consistent, owner not verified
  6    a node or the server refused
  7    a disk failed; nothing was released
  130  interrupted; a simulation can be resumed
  141  whoever read the output went away

Add --debug (or set UMBEL_DEBUG=1) to see where an error came from."""

_BEFORE_IMPORTS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Threads of ours work on shards of users; those of BLAS would fight with them."""
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
_EXTRAS = {"pyarrow": "parquet", "ray": "ray", "torch": "audit", "opacus": "audit"}
_OPTIONAL = frozenset(_EXTRAS) | {"scipy", "dp_accounting", "mpmath", "jinja2", "matplotlib"}
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_DEFECT, _BAD_INPUT, _DISK_FAILED, _INTERRUPTED, _PIPE_CLOSED = 1, 2, 7, 130, 141
_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())  # click before 8.2 shows the help itself
_SAID_TWICE = re.compile(r"( Did you mean [^?]*\?)\1")  # by click, and by typer


class RunInterruptedError(UmbelError):
    """Ctrl-C; the message says how to go on."""

    exit_code: ClassVar[int] = _INTERRUPTED


app = typer.Typer(
    help="Learn what users share under user-level differential privacy; keep what differs on their devices.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_ledger.commands, name="ledger")
app.add_typer(cli_federation.commands)
app.add_typer(cli_node.commands)
app.add_typer(cli_incremental.commands)
app.add_typer(cli_provision.commands)


def main() -> None:
    """The command `umbel`."""
    code = run(sys.argv[1:])
    if code == _INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors become one line on stderr."""
    for name, value in _BEFORE_IMPORTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_QUIET)
    spell_out(sys.stdout)
    spell_out(sys.stderr)
    debug = "--debug" in arguments or os.environ.get("UMBEL_DEBUG", "") not in ("", "0")
    rest = [argument for argument in arguments if argument != "--debug"]
    try:
        code = int(typer.main.get_command(app).main(rest, prog_name="umbel", standalone_mode=False) or 0)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except _NO_ARGUMENTS as error:
        error.show()
        return _BAD_INPUT
    except (BrokenPipeError, SystemExit) as error:  # click and rich turn the former into the latter
        if not _is_closed_pipe(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return _PIPE_CLOSED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = _explained(error)
        _complain(message)
        return code
    if code == _INTERRUPTED:
        _complain("interrupted; nothing was charged.")
    return code


def _is_closed_pipe(error: BaseException) -> bool:
    return isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)


def _explained(error: Exception) -> tuple[int, str]:
    """Exit code and message of an exception; the text of one we did not foresee could hold data, and stays out."""
    match error:
        case RunInterruptedError():
            return error.exit_code, str(error)
        case UmbelError():
            return error.exit_code, f"error: {error}"
        case click.ClickException():
            return _BAD_INPUT, "error: " + _SAID_TWICE.sub(r"\1", error.format_message())
        case ModuleNotFoundError() if (package := str(error.name).partition(".")[0]) in _OPTIONAL:
            extras = ",".join(dict.fromkeys(["simulate", _EXTRAS.get(package, "simulate")]))
            return _BAD_INPUT, f'error: Expected the package {package}, found none. Run: pip install "umbel[{extras}]"'
        case OSError() if error.filename is not None:
            code = _DISK_FAILED if error.errno in _DISK_TROUBLE else _BAD_INPUT
            return code, f"error: Expected to use {error.filename}, got {error.strerror}."
        case _:
            return _DEFECT, f"error: {type(error).__name__}: this is a defect; run with --debug to see where."


def _complain(message: str) -> None:
    print("umbel:", " ".join(message.split()), file=sys.stderr)  # noqa: T201 (the command line's voice)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"umbel {_version()}")  # noqa: T201
        raise typer.Exit


def _version() -> str:
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("umbel")
    except PackageNotFoundError:  # a checkout that is not installed
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text("utf-8"))["project"]["version"])


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Options before a command; `run` has already seen to --debug."""


@app.command(
    epilog="""\b
Examples:
  umbel simulate
  umbel simulate --data ml-1m --epsilon 2 --rounds 20 --ledger ml-1m.jsonl --out runs/first
  umbel simulate --data ml-1m --epsilon 1 --rounds 5 --ledger ml-1m.jsonl --start runs/first
  umbel simulate --config examples/recommender/config.toml --data ml-1m --model my.py:make_model
  umbel simulate --resume runs/first""",
    cls=PlainCommand,
)
def simulate(
    *,
    data: Annotated[str | None, typer.Option(help='File or folder, or "synthetic".')] = None,
    data_format: Annotated[
        str | None, typer.Option(help="auto, movielens-1m, movielens-100k, ratings, table or synthetic.")
    ] = None,
    target_range: Annotated[str | None, typer.Option(help='Declared range of the target, as in "1,5".')] = None,
    catalogue: Annotated[str | None, typer.Option(help="Public list of item ids.")] = None,
    item_features: Annotated[str | None, typer.Option(help="CSV of public item features.")] = None,
    on_bad_rows: Annotated[str | None, typer.Option(help="error or skip.")] = None,
    split_seed: Annotated[int | None, typer.Option(help="Which held-out split; harmless.")] = None,
    family: Annotated[
        str | None, typer.Option(help="Loss: squared or logistic; softmax for a network of classes.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNCTION", help="Adapt the torch module that the function returns.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Columns of U; of a network, of each layer.")] = None,
    sparsity: Annotated[int | None, typer.Option(help="Cap on the nonzeros of a user's own part.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How many releases.")] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="gradient, or amht-lrs: alternating minimization as published.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(metavar="RUN|MODEL", help="Start from the model of an earlier run on the ledger.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="in-process or flower.")] = None,
    device: Annotated[str | None, typer.Option(help="Of networks: cpu, or cuda.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Into how many nodes the users are split.")] = None,
    epsilon: Annotated[str | None, typer.Option(help="Budget of the ledger, or none: NOT PRIVATE.")] = None,
    delta: Annotated[float | None, typer.Option(help="Of the budget; by default min(1e-6, 1/(10 users)).")] = None,
    ledger_epsilon: Annotated[
        float | None, typer.Option(help="Budget of a ledger that is made, for later runs too; by default --epsilon.")
    ] = None,
    sampling_probability: Annotated[
        str | None, typer.Option(help="Each device tosses a coin in each round; on a ledger of its own.")
    ] = None,
    noise: Annotated[str | None, typer.Option(help="rounded or discrete Gaussians; the latter by OpenDP.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fix the privacy noise, for tests: NOT PRIVATE.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="The population's ledger; by default one in the run.")] = None,
    out: Annotated[Path | None, typer.Option(help="New run folder; by default runs/<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, as it was started.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; options override it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, as in data.synthetic.users=60.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and stop.")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", show_default=False, help="Compare or not.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; warnings and results stay.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Train on this machine; compare with baselines."""
    from umbel.options import configuration

    if dry_run and resume is not None:
        raise UmbelError("Expected --dry-run for a new run, got --resume too: its noise is fixed. Leave one out.")
    loaded = configuration(
        {
            "data.source": data,
            "data.format": data_format,
            "data.target_range": target_range,
            "data.catalogue": catalogue,
            "data.item_features": item_features,
            "data.on_bad_rows": on_bad_rows,
            "data.split_seed": split_seed,
            "model.family": family,
            "network.module": model,
            "model.rank": rank,
            "model.sparsity": sparsity,
            "training.rounds": rounds,
            "training.algorithm": algorithm,
            "training.start": start,
            "training.engine": engine,
            "training.device": device,
            "training.nodes": nodes,
            "privacy.epsilon": epsilon,
            "privacy.delta": delta,
            "privacy.ledger_epsilon": ledger_epsilon,
            "privacy.sampling_probability": sampling_probability,
            "privacy.noise": noise,
            "privacy.seed": seed,
            "run.ledger": ledger,
            "run.out": out,
        },
        pairs=set_ or (),
        file=config,
        resume=resume,
    )
    if dry_run:
        from umbel.plan import forecast_of

        _show_plan(forecast_of(loaded), output)
    else:
        _simulate(loaded, baselines=baselines, quiet=quiet, output=output)


def _simulate(config: Any, *, baselines: bool, quiet: bool, output: Format) -> None:
    from umbel import console
    from umbel.options import with_folder

    try:
        with console.watching(quiet=quiet) as watcher, contextlib.redirect_stdout(sys.stderr):
            watcher.step("starting")
            from umbel.simulate import default_folder, simulate

            logging.getLogger("flwr").setLevel(logging.WARNING)
            config = with_folder(config, default_folder)
            results = simulate(config, progress=watcher, with_baselines=baselines)
    except KeyboardInterrupt:
        raise RunInterruptedError(_way_back(config.run.out, baselines=baselines)) from None
    if output is Format.JSON:
        print_json(results)
    else:
        console.show_results(results)


def _way_back(out: str | None, *, baselines: bool) -> str:
    if out is None or not (Path(out) / "config.toml").exists():
        return "interrupted before the first round; nothing was charged. Start it again."
    without = "" if baselines else " --no-baselines"
    return f"interrupted; nothing is lost. Go on with: umbel simulate --resume {out}{without}"


@app.command(
    epilog="""\b
Examples:
  umbel plan --epsilon 1 --delta 1e-6 --rounds 10
  umbel plan --noise-multiplier 4 --rounds 50
  umbel plan --epsilon 1 --rounds 10 --ledger ml-1m.jsonl
  umbel plan --epsilon 1 --rounds 100 --sampling-probability 0.1""",
    cls=PlainCommand,
)
def plan(
    *,
    rounds: Annotated[
        int, typer.Option(show_default=False, help="Releases a user contributes to, by default 10.")
    ] = 10,
    epsilon: Annotated[
        str | None, typer.Option(help="Find the least noise within this budget; or none: NOT PRIVATE.")
    ] = None,
    noise_multiplier: Annotated[str | None, typer.Option(help="Or say what this noise costs.")] = None,
    delta: Annotated[float | None, typer.Option(help="By default 1e-6, or less for more than 100,000 users.")] = None,
    max_nodes_per_user: Annotated[int | None, typer.Option(min=1, help="On how many nodes one user may be.")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="How many users there are.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Also say what this ledger, or that of this run folder, has left.")
    ] = None,
    sampling_probability: Annotated[
        str | None, typer.Option(help="Also say what it would buy if each device tossed a coin in each round.")
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Say what a run would cost, before any data is touched."""
    if (epsilon is None) == (noise_multiplier is None):
        got, remedy = ("neither", "Add --epsilon 1") if epsilon is None else ("both", "Leave one out")
        raise UmbelError(f"Expected one of --epsilon and --noise-multiplier, got {got}. {remedy}.")
    from umbel.auditing import find_ledger
    from umbel.plan import NO_NOISE, forecast

    document = forecast(
        epsilon=_budget(epsilon),
        noise_multiplier=NO_NOISE if epsilon == "none" else noise_multiplier,
        delta=delta,
        rounds=rounds,
        max_nodes_per_user=max_nodes_per_user,
        users=users,
        ledger_path=None if ledger is None else find_ledger(ledger),
        sampling_probability=sampling_probability,
    )
    _show_plan(document, output)


def _budget(epsilon: str | None) -> float | None:
    if epsilon in (None, "none"):
        return None
    try:
        return float(epsilon)
    except ValueError:
        raise UmbelError(f"Expected a number above 0, or none, got {epsilon=}. Correct --epsilon.") from None


def _show_plan(plan: Mapping[str, Any], output: Format) -> None:
    """Print a plan; one that its ledger has no room for ends with that error."""
    if output is Format.JSON:
        print_json(plan)
    else:
        from umbel.console import show_plan

        show_plan(plan)
    ledger = plan["ledger"]
    if ledger is not None and not ledger["fits"]:
        raise BudgetExhausted(
            f"Expected a budget for {plan['rounds']} rounds, got one with room for {ledger['affordable_rounds']} "
            f"in {ledger['path']}. Lower --epsilon or --rounds."
        )


class Threat(StrEnum):
    """What the attack of an empirical audit sees."""

    LAST = "last"
    ALL = "all"


@app.command(
    epilog="""\b
Examples:
  umbel audit runs/first
  umbel audit runs/first --public-key owner.pem --anchor 41:9f3c...
  umbel audit ml-1m.jsonl --delta 1e-6 --delta 1e-9 --format json
  umbel audit runs/first runs/second
  umbel audit runs/first --empirical --canaries 2000
Exit codes: 0 verified; 5 consistent, owner not verified (no --public-key);
  4 verification failed; 3 authentic, but over budget; 2 cannot be read.
A ledger that promises nothing can be verified too: its status says NOT PRIVATE.""",
    cls=PlainCommand,
)
def audit(
    *,
    targets: Annotated[
        list[Path],
        typer.Argument(help="A run folder, or a ledger; several of the same users add up.", metavar="RUN|LEDGER..."),
    ],
    public_key: Annotated[
        list[str] | None, typer.Option(metavar="HEX|FILE", help="The owner's key; of several ledgers, each one's.")
    ] = None,
    anchor: Annotated[str | None, typer.Option(metavar="SEQUENCE:HEAD", help="A head that was seen before.")] = None,
    delta: Annotated[
        list[float] | None, typer.Option(help="Recompute epsilon for this delta; may be given several times.")
    ] = None,
    all_signatures: Annotated[bool, typer.Option("--all-signatures", help="Check every line's signature.")] = False,
    require_model: Annotated[
        bool, typer.Option("--require-model", help="Fail where the model cannot be recomputed.")
    ] = False,
    empirical: Annotated[
        bool, typer.Option("--empirical", help="Also attack the run's mechanism with made-up users; writes that down.")
    ] = False,
    canaries: Annotated[int | None, typer.Option(help="How many made-up users, by default 1000.")] = None,
    threat: Annotated[
        Threat | None, typer.Option(help="The attack sees the last model, or all releases (default).")
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Verify a ledger and recompute what was spent."""
    from umbel import auditing

    if not empirical and (canaries is not None or threat is not None):
        name = "--threat" if canaries is None else "--canaries"
        raise UmbelError(f"Expected {name} with --empirical, got it alone. Add --empirical, or leave it out.")
    attack = auditing.Attack(canaries=1000 if canaries is None else canaries, threat=(threat or Threat.ALL).value)
    document = auditing.audit(
        targets,
        public_keys=public_key or (),
        anchor=anchor,
        deltas=delta or (),
        all_signatures=all_signatures,
        require_model=require_model,
        attack=attack if empirical else None,
    )
    if output is Format.JSON:
        print_json(document)
    else:
        from umbel.console import show_audit, show_audit_together

        (show_audit if len(targets) == 1 else show_audit_together)(document)
    raise typer.Exit(document["exit_code"])
