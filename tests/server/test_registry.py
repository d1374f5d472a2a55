"""The registry: who may be invited, and nobody else."""

import pytest

from common.errors import UmbelError
from server.registry import Registry, load_registry, registry_of


def test_counts():
    """Population size, the most users on a node, and users by name."""
    registry = registry_of([("b", 3), ("a", 5)])
    assert registry.population_size == 8
    assert registry.users_per_node == 5
    assert registry.users_of() == {"a": 5, "b": 3}
    assert Registry(nodes=()).population_size == 0
    assert Registry(nodes=()).users_per_node == 0


def test_order_does_not_change_the_digest_and_anything_else_does():
    """The digest in the ledger stands for names and counts, in whatever order they came."""
    digest = registry_of([("b", 3), ("a", 5)]).digest
    assert registry_of([("a", 5), ("b", 3)]).digest == digest
    others = [[("a", 5)], [("a", 5), ("b", 4)], [("a", 5), ("c", 3)], [("a", 3), ("b", 5)]]
    assert len({registry_of(nodes).digest for nodes in others} | {digest}) == 5


def test_comes_back(tmp_path):
    """What was saved is what is loaded, by digest too."""
    registry = registry_of([("node-ü", 3), ("a", 5)])
    registry.save(tmp_path / "registry")
    assert load_registry(tmp_path / "registry") == registry
    assert load_registry(tmp_path / "registry").digest == registry.digest


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"nodes": [{"name": "a"}]}', '{"nodes": 3}', '{"nodes": [3]}', "\xff"]
)
def test_other_files_are_refused(tmp_path, text):
    """A registry is not guessed at."""
    (tmp_path / "registry").write_text(text, "latin-1")
    with pytest.raises(UmbelError, match="Expected a registry"):
        load_registry(tmp_path / "registry")


def test_a_missing_registry_is_named(tmp_path):
    """The message has the path."""
    with pytest.raises(UmbelError, match="nowhere"):
        load_registry(tmp_path / "nowhere")


def test_a_name_is_registered_once():
    """Two entries of one name would count one node's users twice, or hide some of them."""
    with pytest.raises((UmbelError, ValueError), match="Expected"):
        registry_of([("a", 5), ("a", 3)])


@pytest.mark.parametrize("users", [0, -1])
def test_a_node_hosts_somebody(users):
    """A node without users, or with fewer, cannot be registered: its bound would be meaningless."""
    with pytest.raises((UmbelError, ValueError), match="Expected"):
        registry_of([("a", users)])
