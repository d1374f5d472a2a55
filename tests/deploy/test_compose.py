"""The containers of docker-compose.yml and the Dockerfile, as far as can be told without a container engine.

Commands are read by the parsers of the programs themselves, paths are looked up in a folder that `umbel provision` has
made, and what the edge image installs is followed through the metadata of what is installed here.
"""

import argparse
import importlib
import importlib.metadata
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from client.settings import load_settings
from server.health import argument_parser as health_parser
from umbel import cli

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EDGES = sorted(name for name in SERVICES if name.startswith("edge"))
SERVER_SIDE = sorted(set(SERVICES) - {*EDGES, "enrol"})
VARIABLE = re.compile(r"\$\{(\w+)(?::\?[^}]*)?\}")
HEAVY = {"torch", "ray", "scipy", "opacus", "dp-accounting", "matplotlib", "jinja2", "prometheus-client", "pyarrow"}
PARSERS = {
    "flower-superlink": ("flwr.superlink.cli.flower_superlink", "_parse_args_run_superlink"),
    "flower-superexec": ("flwr.supercore.cli.flower_superexec", "_parse_args"),
    "server.metrics": ("server.metrics", "argument_parser"),
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the command has provisioned."""
    folder = tmp_path_factory.mktemp("provisioned") / "federation"
    assert cli.run(["provision", str(folder), "--nodes", "3", "--host", "fleet-proxy"]) == 0
    return folder


@pytest.fixture(scope="module")
def variables(federation: Path) -> dict[str, str]:
    """What `compose.env` sets."""
    lines = (federation / "compose.env").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolated(text: str, variables: dict[str, str]) -> str:
    """As docker compose reads it."""
    return VARIABLE.sub(lambda found: variables[found[1]], text)


def command_of(name: str, variables: dict[str, str]) -> list[str]:
    """What a service runs, with its image's entry point."""
    service = SERVICES[name]
    words = [interpolated(word, variables) for word in service["command"]]
    return ["umbel", *words] if service["build"]["target"] == "edge" else words


def read_by_its_own_parser(words: list[str]) -> object:
    """What the program itself makes of its command line; it ends with an error where it cannot."""
    program, *rest = words
    if program == "python":
        assert rest[0] == "-m"
        program, *rest = rest[1:]
    if program == "umbel":
        return read_by_typer(cli.app, rest)
    if program == "server.fleet_proxy":
        return importlib.import_module(program)._arguments(rest)
    module, function = PARSERS[program]
    parser: argparse.ArgumentParser = getattr(importlib.import_module(module), function)()
    given = {word.split("=", 1)[0] for word in rest if word.startswith("--")}
    for action in parser._actions:
        if given.intersection(action.option_strings):
            assert action.help != argparse.SUPPRESS, action.option_strings
            assert not str(action.help).startswith("Deprecated"), action.option_strings
    return parser.parse_args(rest)


def read_by_typer(app: typer.Typer, words: list[str]) -> dict[str, Any]:
    """The parameters of the command that the words name, in groups of groups."""
    command: click.Command | None = typer.main.get_command(app)
    context = click.Context(command or click.Command(""), info_name="")
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        assert command is not None
        if not isinstance(command, click.Group):
            return command.make_context(name, words, parent=context).params
        context = click.Context(command, parent=context, info_name=name)
    raise AssertionError(words)


@pytest.mark.parametrize("name", [*SERVER_SIDE, *EDGES])
def test_every_command_is_one_of_its_program(name: str, variables: dict[str, str]) -> None:
    """No flag is unknown, missing or deprecated in the versions that are installed."""
    try:
        read_by_its_own_parser(command_of(name, variables))
    except (SystemExit, click.ClickException) as error:
        pytest.fail(f"{name}: {error}")


@pytest.mark.filterwarnings("ignore:.*not supported by Typer:DeprecationWarning")  # Flower's options
def test_enrolment_registers_every_node_by_its_public_key(tmp_path: Path, variables: dict[str, str]) -> None:
    """The script writes what Flower reads as SuperLink's address, and hands it each node's public key and name."""
    from flwr.cli.app import app as flwr_app

    shell, options, script = command_of("enrol", variables)
    assert (shell, options) == ("sh", "-euc")
    (tmp_path / "flwr").write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n')
    (tmp_path / "flwr").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "FLWR_HOME": str(tmp_path / "home"),
    }
    subprocess.run(["sh", options, script.replace("$$", "$")], env=environment, check=True)
    settings = tomllib.loads((tmp_path / "home" / "config.toml").read_text("utf-8"))
    address = f"superlink:{variables['UMBEL_SUPERLINK_PORT']}"
    assert settings == {"superlink": {"backend": {"address": address, "root-certificates": "/run/secrets/ca_crt"}}}
    names = []
    for line in (tmp_path / "calls").read_text("utf-8").splitlines():
        found = read_by_typer(flwr_app, shlex.split(line))
        assert (found["superlink"], found["output_format"]) == ("backend", "json")
        assert mounts_of("enrol", variables)[f"{found['public_key']}:ro"].endswith(f"{found['name']}/auth.key.pub")
        names.append(found["name"])
    assert names == EDGES


def test_the_parsers_refuse_what_is_wrong(variables: dict[str, str]) -> None:
    """A flag that does not exist is seen in every kind of program."""
    for name in ("superlink", "serverapp", "fleet-proxy", "metrics", EDGES[0]):
        with pytest.raises((SystemExit, click.ClickException)):
            read_by_its_own_parser([*command_of(name, variables), "--no-such-flag"])
    with pytest.raises(AssertionError):
        read_by_its_own_parser(["flower-superlink", "--fleet-api-address=0.0.0.0:9092"])


def health_check_of(name: str) -> list[str]:
    """The words of a service's health check: its own, or its image's."""
    service = SERVICES[name]
    if "healthcheck" in service:
        kind, *words = service["healthcheck"]["test"]
        assert kind == "CMD"
        return list(words)
    stage = re.search(rf"^FROM \S+ AS {service['build']['target']}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert stage is not None
    found = re.search(r"^HEALTHCHECK .*?CMD (\[.*\])$", stage[1], re.M | re.S)
    assert found is not None
    return list(json.loads(found[1]))


@pytest.mark.parametrize("name", SERVER_SIDE)
def test_health_checks_ask_where_the_service_answers(name: str, variables: dict[str, str]) -> None:
    """Each asks on loopback in the container, at the port that the service's own command line opens for it."""
    python, dash_m, module, *rest = health_check_of(name)
    assert (python, dash_m, module) == ("python", "-m", "server.health")
    address = str(health_parser().parse_args(rest).address)
    scheme, port = re.fullmatch(r"(grpc|http)://127\.0\.0\.1:(\d+)(?:/\w+)?", address).groups()  # type: ignore[union-attr]
    opened = {
        "grpc": f"--health-server-address=127.0.0.1:{port}",
        "http": f"--health-port={port}" if name == "fleet-proxy" else f"--listen=0.0.0.0:{port}",
    }
    assert opened[scheme] in command_of(name, variables)


def test_a_nodes_health_check_is_a_program() -> None:
    """The image's check of a node runs, and says no where there is no node."""
    python, dash_c, program = health_check_of(EDGES[0])
    assert (python, dash_c) == ("python", "-c")
    with pytest.raises(SystemExit) as ended:
        exec(program, {})  # noqa: S102
    assert ended.value.code


def test_only_the_proxy_is_open_to_others(variables: dict[str, str]) -> None:
    """Every other published port is published on loopback, and the proxy publishes nothing but its door."""
    opened = {
        name: [interpolated(port, variables) for port in service.get("ports", [])] for name, service in SERVICES.items()
    }
    door = variables["UMBEL_FLEET_PORT"]
    assert opened.pop("fleet-proxy") == [f"{door}:{door}"]
    assert f"--listen=0.0.0.0:{door}" in command_of("fleet-proxy", variables)
    assert [port for ports in opened.values() for port in ports if not port.startswith("127.0.0.1:")] == []
    assert not any("network_mode" in service or "expose" in service for service in SERVICES.values())


def test_nodes_reach_the_proxy_and_nothing_else(variables: dict[str, str]) -> None:
    """Nodes are on a network without a way out, which the proxy alone shares; SuperLink's is another one."""
    assert len(EDGES) >= 3
    assert all(SERVICES[name]["networks"] == ["edge"] for name in EDGES)
    assert [name for name in SERVER_SIDE if "edge" in SERVICES[name]["networks"]] == ["fleet-proxy"]
    assert all(COMPOSE["networks"][name] == {"internal": True} for name in ("edge", "backend"))
    assert "backend" not in {network for name in EDGES for network in SERVICES[name]["networks"]}
    assert SERVICES["serverapp"]["networks"] == ["backend"]


@pytest.mark.parametrize("name", EDGES)
def test_nodes_find_what_their_settings_name(name: str, federation: Path, variables: dict[str, str]) -> None:
    """A node's settings call the proxy as its neighbours call it; its keys are in what is mounted, its store where it
    can write."""
    folder = federation / "nodes" / name
    mounts = mounts_of(name, variables)
    assert mounts == {"/etc/umbel:ro": str(folder), "/etc/umbel/store": str(folder / "store")}
    settings = load_settings(folder / "node.toml")
    assert settings.superlink == f"fleet-proxy:{variables['UMBEL_FLEET_PORT']}"
    assert Path(settings.store).is_relative_to(folder / "store")
    for path in (settings.auth_key, settings.signing_key, settings.root_certificates):
        assert path is not None
        assert Path(path).is_relative_to(folder)
        assert Path(path).is_file()


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_containers_can_do_little(name: str) -> None:
    """Read-only, no capability, no new privilege, not root unless the operator is, limits on what they take."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert VARIABLE.sub(r"\1", service["user"]) == "UMBEL_UID:UMBEL_GID"
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert {"privileged", "cap_add", "pid", "ipc", "devices", "env_file", "environment"}.isdisjoint(service)


def test_every_variable_is_provisioned(variables: dict[str, str]) -> None:
    """compose.env has every variable that the file cannot do without, and none that looks like a secret."""
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    found = set(VARIABLE.findall(text))
    assert len(VARIABLE.findall(text)) == text.replace("$$", "").count("$") > 10
    assert found <= set(variables)
    assert not re.search(r"BEGIN|[0-9a-f]{64}", "".join(variables.values()))


def mounts_of(name: str, variables: dict[str, str]) -> dict[str, str]:
    """What of the host a service sees: where it lies outside, by where it is inside (with `:ro` if it is read-only)."""
    found = {}
    for volume in SERVICES[name].get("volumes", []):
        source, target = interpolated(volume, variables).split(":", 1)
        if source not in COMPOSE["volumes"]:
            found[target] = source
    for secret in SERVICES[name].get("secrets", []):
        found[f"/run/secrets/{secret}:ro"] = interpolated(COMPOSE["secrets"][secret]["file"], variables)
    return found


def test_secrets_are_files_of_the_provisioned_folder(variables: dict[str, str]) -> None:
    """Nothing secret stands in the file: each secret is a file, nothing else, and used by somebody."""
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    assert not re.search(r"BEGIN [A-Z ]+|[0-9a-f]{32}", text)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_what_is_mounted_exists(name: str, federation: Path, variables: dict[str, str]) -> None:
    """Everything mounted is in the folder after provisioning, since docker would make a folder of what is not."""
    for target, source in mounts_of(name, variables).items():
        assert Path(source).is_relative_to(federation), source
        assert Path(source).exists(), f"{source} for {target}"


def test_every_path_in_a_command_is_mounted(variables: dict[str, str]) -> None:
    """A command names no file that its container does not have."""
    for name, service in SERVICES.items():
        volumes = [interpolated(volume, variables).split(":")[1] for volume in service.get("volumes", [])]
        places = {target.split(":")[0] for target in mounts_of(name, variables)} | set(volumes)
        for word in command_of(name, variables):
            path = word.rpartition("=")[2]
            if path.startswith("/"):
                assert any(Path(path).is_relative_to(place) for place in places), f"{name}: {word}"


def test_keys_go_where_they_are_needed(federation: Path, variables: dict[str, str]) -> None:
    """The authority's and the recovery key are in no container, the server's in none of a node and the other way."""
    for name in SERVICES:
        seen = [Path(source) for source in mounts_of(name, variables).values()]
        for key in (federation / "ca" / "ca.key", federation / "recovery" / "recovery.key"):
            assert not any(key.is_relative_to(source) for source in seen), name
        if name in EDGES:
            assert all(source.is_relative_to(federation / "nodes" / name) for source in seen)
        else:
            assert not any(s.is_relative_to(federation / "nodes") and s.suffix != ".pub" for s in seen)
    ledger_key = federation / "server" / "ledger.key"
    sees_it = [n for n in SERVICES if any(ledger_key.is_relative_to(s) for s in mounts_of(n, variables).values())]
    assert sees_it == ["serverapp"]


def test_images_are_the_two_targets() -> None:
    """Each service is built from the Dockerfile's target for its side, and neither target runs as root."""
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M))
    targets = {name: service["build"]["target"] for name, service in SERVICES.items()}
    assert targets == {name: "edge" if name in EDGES else "server" for name in SERVICES}
    assert stages["base"] in ("edge", "server") or {"edge", "server"} <= set(stages.values())
    final = DOCKERFILE.split(" AS base\n")[1]
    users = re.findall(r"^USER (\S+)$", final, re.M)
    assert users == ["10001:10001"]
    for target in ("edge", "server"):
        assert f"FROM base AS {target}\n" in DOCKERFILE
        assert f"COPY --from={target}-install /opt/umbel /opt/umbel\n" in final


def test_the_image_has_no_secret_and_a_pinned_base() -> None:
    """Only named folders of the checkout are copied, which are there, and .dockerignore holds everything else back."""
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-\w+$", DOCKERFILE, re.M)
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M) for word in shlex.split(line)[:-1]
    ]
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert "*" in ignore
    assert {"**/*.key", "**/*.secret"} <= set(ignore)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(packages["packages"]) <= set(copied)
    assert not re.search(r"^ADD |curl|wget", DOCKERFILE, re.M)


def installed_with(requirements: list[str]) -> set[str]:
    """Names of everything that requirements bring along, from the metadata of what is installed."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in needed:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                waiting.append(inner)
    return found


def test_the_edge_image_is_light() -> None:
    """What the edge image installs has no torch, ray, scipy or opacus in it, and the server's has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    edge = installed_with(project["dependencies"])
    assert {"flwr", "numpy", "httpx", "starlette"} <= edge
    assert edge & HEAVY == set()
    extras = project["optional-dependencies"]
    server = installed_with([text for text in extras["server"] + extras["simulate"] if not text.startswith("umbel")])
    assert {"scipy", "prometheus-client"} <= server
    installs = re.findall(r"pip install .*--constraint constraints\.txt (\S+)$", DOCKERFILE, re.M)
    assert installs == [".", '".[server]"']
