"""A node's store on this machine, with what the node's settings declare about its data."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from client.kept_gram import check_keep_gram
from client.kept_model import KeptModel
from client.settings import NodeSettings, load_settings
from client.store import DeviceStore
from client.store_file import MEMORY
from common.data import DataSchema
from common.errors import UmbelError
from common.loading import public_schema


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeState:
    """A node's store, with what its settings declare.

    Attributes:
        store: The store, open.
        settings: Of the node.
        schema: Of its data.
    """

    store: DeviceStore
    settings: NodeSettings
    schema: DataSchema

    def check(self, kept: KeptModel) -> KeptModel:
        """The model, if it is of the declared columns.

        Raises:
            UmbelError: If it is of others.
        """
        if kept.schema != self.schema.digest:
            raise UmbelError(
                "Expected the columns and the target's range of the kept model, got others in [data]. "
                "Undo the change, or wait for the end of the next run."
            )
        return kept

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.store.close()


def open_store(settings: NodeSettings) -> DeviceStore:
    """The store of a node that has run before.

    Raises:
        UmbelError: If there is none.
        StorageError: If it cannot be read.
    """
    path = settings.store.format(partition=settings.partition)
    if path == MEMORY or not Path(path).is_file():
        raise UmbelError(f"Expected the node's store, got store={path}, which is not there. Run umbel node first.")
    return DeviceStore.open(path, ())


def node_state(settings_path: Path) -> NodeState:
    """The state that a node's settings name.

    Raises:
        UmbelError: If the settings cannot be used, or there is no store.
        StorageError: If it cannot be read.
    """
    return _state(load_settings(settings_path))


def node_state_of_store(path: Path) -> NodeState | None:
    """The state that a node's store is, by the `node.toml` in its folder or the one above; None if none names it."""
    for folder in (path.resolve().parent, path.resolve().parent.parent):
        candidate = folder / "node.toml"
        if candidate.is_file():
            settings = load_settings(candidate)
            if Path(settings.store.format(partition=settings.partition)).resolve() == path.resolve():
                return _state(settings)
    return None


def _state(settings: NodeSettings) -> NodeState:
    if settings.network is not None:
        raise UmbelError(
            f"Expected a node of a linear model, got one with network={settings.network!r}. For networks there is "
            "no such command yet: call client.network_fit.fit, or client.network_update.update_network."
        )
    store = open_store(settings)
    try:
        schema = public_schema(settings.data, settings.family)
        check_keep_gram(settings.keep_gram, schema.dimension)
        return NodeState(store=store, settings=settings, schema=schema)
    except BaseException:
        store.close()
        raise
