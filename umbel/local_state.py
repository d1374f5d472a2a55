"""What a store on this machine is: a node's, with its users' posteriors, or one of entities; named by its file.

A node's store does not say what its features are made of, which is in the node's settings; so it is named by
`node.toml`, or found beside one. What only nodes need is imported for them only: an answer must be there in a moment.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from client.entity_store import EntityStore, is_entity_store
from common.errors import UmbelError

if TYPE_CHECKING:
    from umbel.node_state import NodeState


def open_state(path: Path, *, update: bool = False) -> "NodeState | EntityStore":
    """The state that a path names: a store of entities, a node's settings, or its store.

    Args:
        path: The file.
        update: Whether it will be written to.

    Raises:
        UmbelError: If there is none, or it belongs to no settings that can be found.
        StorageError: If it cannot be read.
    """
    if is_entity_store(path):
        return EntityStore.open(path, update=update)
    from umbel.node_state import node_state, node_state_of_store  # noqa: PLC0415

    if path.suffix == ".toml":
        return node_state(path)
    if path.is_dir():
        raise UmbelError(f"Expected a store or a node.toml, got {path}, which is a folder. Name the file in it.")
    if not path.is_file():
        raise UmbelError(f"Expected a store, got {path}, which is not there. Make one with umbel update --init.")
    found = node_state_of_store(path)
    if found is None:
        raise UmbelError(
            f"Expected a store of entities, or a node's store beside its node.toml, got {path}. "
            "Name the node.toml instead."
        )
    return found
