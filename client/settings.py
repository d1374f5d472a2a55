"""A node's own configuration: where its data and its store are, and whom it trusts.

It comes from a file of the node's operator and never from a message: a server can name no path, no column and
no limit of a node.
"""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from client.guard import Policy
from common.config import DataConfig, Family
from common.errors import UmbelError


class NodeSettings(BaseModel):
    """What a node is told by its operator.

    Attributes:
        name: Of the node in the server's registry; `{partition}` is replaced by Flower's partition number.
        store: SQLite file of the node, or ":memory:"; `{partition}` is replaced likewise.
        public_key: Ed25519 key of the ledger, hex.
        ledger_id: The ledger this node answers; None trusts the first one it sees.
        mu_max: Limit of each user on this node, a decimal string or "inf".
        max_users_per_node: The most users in one sum.
        allow_not_private: Answer releases without noise or with seeded noise: for simulations.
        allow_sampling: Answer sampled runs too, tossing each user's coin here.
        coin_seed: Makes coins repeat where the noise is seeded, and nowhere else: for simulations.
        allow_statistics: Answer AMHT-LRS too, from whose moments and statistics the server that adds the noise can
            compute X'X of a user who is alone on the node, or y x' of an example where a round uses but one.
        family: Loss family of the target.
        data: The users' data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "node-{partition}"
    store: str
    public_key: str
    ledger_id: str | None = None
    mu_max: str
    max_users_per_node: int = 1_000_000
    allow_not_private: bool = False
    allow_statistics: bool = False
    allow_sampling: bool = True
    coin_seed: int | None = None
    family: Family = "squared"
    data: DataConfig

    def policy(self) -> Policy:
        """The limits that the guard enforces."""
        works = frozenset({"gradient"}) | ({"moment", "statistics"} if self.allow_statistics else set())
        return Policy(
            works=works,
            public_key=bytes.fromhex(self.public_key),
            ledger_id=self.ledger_id,
            mu_max=self.mu_max,
            max_users_per_node=self.max_users_per_node,
            allow_not_private=self.allow_not_private,
            allow_sampling=self.allow_sampling,
        )


def load_settings(path: str | Path) -> NodeSettings:
    """Read a node's TOML file.

    Raises:
        UmbelError: If it cannot be read or is not as declared; names the file and the key.
    """
    try:
        return NodeSettings.model_validate(tomllib.loads(Path(path).read_text("utf-8")))
    except OSError as error:
        raise UmbelError(f"{path}: Expected a node's settings, got {error.strerror}.") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UmbelError(f"{path}: Expected valid settings, got a problem at {key}: {problem['msg']}.") from error
    except ValueError as error:
        raise UmbelError(f"{path}: Expected TOML in UTF-8, got this problem: {error}.") from error
