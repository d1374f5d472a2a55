"""What `umbel up` tells SuperLink about nodes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import load_config
from umbel.deploy import Federation, NodeSeen
from umbel.provision import Request, provision


class FakeControl:
    """SuperLink's list of nodes."""

    def __init__(self, *nodes: NodeSeen) -> None:
        self._nodes = dict(enumerate(nodes, 1))

    def nodes(self) -> list[NodeSeen]:
        return list(self._nodes.values())

    def register(self, name: str, public_key: bytes) -> None:
        number = len(self._nodes) + 10
        self._nodes[number] = NodeSeen(name=name, public_key=public_key, is_online=False, number=number)

    def unregister(self, number: int) -> None:
        del self._nodes[number]


def test_the_key_from_before_a_rotation_connects_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stolen key is taken from SuperLink's list once its node has another; nodes of other names stay."""
    config = load_config(None, {"data.synthetic.users": 4, "data.synthetic.examples": 4})
    ports = dict.fromkeys(("superlink", "fleet", "metrics"), 0)
    provision(tmp_path / "fed", Request(nodes=2, config=config, ports=ports))
    federation = Federation(tmp_path / "fed")
    control = FakeControl(NodeSeen(name="by hand", public_key=b"key", is_online=True, number=1))

    @contextlib.contextmanager
    def fake() -> Iterator[FakeControl]:
        yield control

    monkeypatch.setattr(federation, "control", fake)
    federation._register()
    before = {node.name: node.public_key for node in control.nodes()}
    assert before.keys() == {"by hand", "edge-1", "edge-2"}
    provision(tmp_path / "fed", Request(rotate=("edge-2",), ports=dict.fromkeys(ports)))
    federation._register()
    after = {node.name: node.public_key for node in control.nodes()}
    assert len(control.nodes()) == 3
    assert {name for name in before if before[name] != after[name]} == {"edge-2"}
