"""The ClientApp: decode, call, encode. No mathematics, and no exception text, leaves a node from here."""

import os
from collections.abc import Callable
from functools import lru_cache
from weakref import WeakSet

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.service import NodeService
from client.settings import load_settings
from common import wire
from common.errors import Refused, StorageError, UmbelError

SETTINGS_VARIABLE = "UMBEL_NODE_CONFIG"
"""Environment variable with the path of the node's settings, where Flower's node configuration does not name it."""

app = ClientApp()
_services: WeakSet[NodeService] = WeakSet()


@lru_cache(maxsize=1024)
def service_for(settings_path: str, index: int | None, num_nodes: int | None) -> NodeService:
    """The node's service, kept for the life of the process; where Flower names no partition, the settings do."""
    settings = load_settings(settings_path)
    service = NodeService(
        settings,
        settings.partition if index is None else index,
        settings.partitions if num_nodes is None else num_nodes,
    )
    _services.add(service)
    return service


def close_services() -> None:
    """Close and forget all nodes of this process; for a simulation that has ended."""
    service_for.cache_clear()
    while _services:
        _services.pop().close()


@app.query("identity")
def identity(message: Message, context: Context) -> Message:
    """Which node this is."""
    return _answered(message, lambda: _service(context).identity(wire.read_request(message)[0]))


@app.train("contribute")
def contribute(message: Message, context: Context) -> Message:
    """Answer a release with the node's clipped integer sum."""
    return _answered(message, lambda: _service(context).contribute(*wire.read_request(message)))


@app.train("fold_in")
def fold_in(message: Message, context: Context) -> Message:
    """Personalize with a released model."""
    return _answered(message, lambda: _service(context).fold_in(*wire.read_request(message)))


def _service(context: Context) -> NodeService:
    config = context.node_config
    path = config.get("node-config") or os.environ.get(SETTINGS_VARIABLE, "")
    if not path:
        raise UmbelError(f"Expected node-config or {SETTINGS_VARIABLE} to name the node's settings, got neither.")
    index, num_nodes = config.get("partition-id"), config.get("num-partitions")
    return service_for(str(path), None if index is None else int(index), None if num_nodes is None else int(num_nodes))


def _answered(message: Message, compute: Callable[[], bytes]) -> Message:
    try:
        return wire.answer(compute(), message)
    except Refused as refused:
        return wire.refusal(refused.code, message)
    except StorageError:
        return wire.refusal("storage", message)
    except Exception:  # its text could hold data, so not even its type leaves
        return wire.refusal("error", message)
