"""The text of a new node's `node.toml`: the policy that its owner reads, changes and keeps."""

from collections.abc import Mapping
from typing import Any

from common.config import DataConfig, to_toml

_OWN_DATA = """\
# Where this device's data are, and what is declared about them. The declarations must be those of the whole federation;
# no other column is ever read. Take the marks away and fill this in.
#[data]
#source = "data.csv"
#features = [{ name = "age", low = 0, high = 120 }, "weekend"]
#target = "minutes"
#target_range = [0, 600]
"""
_LIMITS = """\
# More limits on what this node answers, each with what it is without it; see docs/device.md.
#[policy]
#max_dimension = 10000
#max_rank = 64
#min_noise_multiplier = "0.05"
"""


def node_toml(
    *,
    identity: Mapping[str, Any],
    trust: Mapping[str, Any],
    limits: Mapping[str, Any],
    connection: Mapping[str, Any],
    data: DataConfig | None,
) -> str:
    """The settings of a node, in the parts in which its owner thinks of them; None is left out.

    Args:
        identity: Who it is, and where its own files are.
        trust: Whom it answers.
        limits: What its users may be asked for.
        connection: How it reaches the server.
        data: The users' data, or None for the owner to fill in.
    """
    parts = (
        ("This node. Paths are relative to this file; no message of a server changes anything in it.", identity),
        ("Whom it trusts: the population's ledger, and the key that may sign the recovery of a lost one.", trust),
        ("What each user may give in total, whatever a server asks; lower it as you like.", limits),
        ("Where the server is.", connection),
    )
    texts = [
        f"# {words}\n{to_toml({key: value for key, value in part.items() if value is not None})}"
        for words, part in parts
    ]
    given = _OWN_DATA
    if data is not None:
        declared = data.model_dump(exclude_none=True, exclude_defaults=True)
        given = to_toml({"data": {"source": data.source, **declared}})
    return "\n".join([*texts, _LIMITS, given])
