"""A node's own configuration: where its data and its store are, and whom it trusts.

It comes from a file of the node's operator and never from a message: a server can name no path, no column and
no limit of a node.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from client.guard import Policy
from client.store_file import MEMORY
from common.config import Count, DataConfig, Family, Positive
from common.errors import UmbelError
from common.families import LINEAR_FAMILIES
from privacy.participation import is_unlimited, limit_units, mu_max_string

Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""32 bytes in lower-case hex."""


class Limits(BaseModel):
    """Limits that the guard enforces beside those of `NodeSettings`, as `client.guard.Policy` explains them; the table
    `[policy]`. What is left out is as there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_dimension: Count | None = None
    max_rank: Count | None = None
    max_coordinates: Count | None = None
    min_noise_multiplier: str | None = None
    min_clipping_norm: Positive | None = None
    max_clipping_norm: Positive | None = None
    min_sampling_probability: str | None = None
    max_sampling_probability: str | None = None


class NodeSettings(BaseModel):
    """What a node is told by its operator.

    Relative paths are relative to the folder of the file.

    Attributes:
        name: Of the node in the server's registry; `{partition}` is replaced by the partition number.
        store: SQLite file of the node, or ":memory:"; `{partition}` is replaced likewise.
        public_key: Ed25519 key of the ledger, hex.
        ledger_id: The ledger this node answers; None trusts the first one it sees.
        recovery_key: Ed25519 key that may sign the recovery of a lost ledger, hex; None accepts none.
        signing_key: The node's own Ed25519 key, a PEM file, with which it signs what it says; None in simulations.
        require_sealing: Refuse releases whose contributions are not sealed.
        mu_max: Limit of each user on this node, a decimal string or "inf"; where it is left out it follows from
            `epsilon` and `delta`.
        epsilon: The largest epsilon of a user in total, at `delta`.
        delta: See there.
        max_contributions: The largest number of releases a user contributes to; None for as many as `mu_max` allows.
        users: How many users the server's registry has for this node: so many places there are; None for as many as
            the data have.
        max_users_per_node: The most users in one sum.
        allow_not_private: Answer releases without noise or with seeded noise: for simulations.
        allow_sampling: Answer sampled runs too, tossing each user's coin here.
        coin_seed: Makes coins repeat where the noise is seeded, and nowhere else: for simulations.
        allow_statistics: Answer AMHT-LRS too, from whose moments and statistics the server that adds the noise can
            compute X'X of a user who is alone on the node, or y x' of an example where a round uses but one.
        family: Loss family of the target.
        network: "FILE.py:FUNCTION", which returns the torch module that this node trains, for networks; the code is the
            node's own, and a message names only its digest.
        device: Where networks are computed, as torch calls it.
        keep_gram: Keep the moments X'DX of each user's examples, so that a new release is folded in exactly; squared
            loss and at most `client.refolding.LARGEST_GRAM` features.
        data: The users' data; no other columns are ever read.
        partition: Which part of the source this node has, where several share one.
        partitions: Into how many parts it is split.
        limits: The table `[policy]`.
        superlink: Where the resident node connects to, "host:port".
        root_certificates: Who signs the server's certificate, a PEM file; None without TLS, for tests on one machine.
        auth_key: The node's key for Flower, an OpenSSH file.
        poll_seconds: How long the resident node waits before it asks for work again.
        bundle_hashes: SHA-256 of the bundles whose runs the resident node answers; empty for all, as its code is its
            own anyway.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "node-{partition}"
    store: str
    public_key: Hex32
    ledger_id: str | None = None
    recovery_key: Hex32 | None = None
    signing_key: str | None = None
    require_sealing: bool = False
    mu_max: str
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_contributions: Annotated[int, Field(ge=0)] | None = None
    users: Count | None = None
    max_users_per_node: int = 1_000_000
    allow_not_private: bool = False
    allow_statistics: bool = False
    allow_sampling: bool = True
    coin_seed: int | None = None
    family: Family = "squared"
    network: str | None = None
    device: str = "cpu"
    keep_gram: bool = False
    partition: Annotated[int, Field(ge=0)] = 0
    partitions: Count = 1
    superlink: str | None = None
    root_certificates: str | None = None
    auth_key: str | None = None
    poll_seconds: Annotated[float, Field(ge=0.01, le=3600)] = 1.0
    bundle_hashes: tuple[Hex32, ...] = ()
    data: DataConfig
    limits: Limits = Field(default=Limits(), alias="policy")

    @model_validator(mode="before")
    @classmethod
    def _derive_mu_max(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "mu_max" in given:
            return given
        epsilon, delta = given.get("epsilon"), given.get("delta")
        if not isinstance(epsilon, int | float) or not isinstance(delta, int | float):
            raise ValueError("mu_max, or else epsilon and delta from which it follows")
        return {**given, "mu_max": mu_max_string(float(epsilon), float(delta))}

    @model_validator(mode="after")
    def _is_one_policy(self) -> "NodeSettings":
        if self.partition >= self.partitions:
            raise ValueError("partition below partitions")
        if self.keep_gram and self.family != "squared":
            raise ValueError("keep_gram with squared loss only, for which X'DX is exact; set keep_gram = false")
        if self.network is None and self.family not in LINEAR_FAMILIES:
            raise ValueError(
                f"family of {sorted(LINEAR_FAMILIES)} without network; name the network's file, or another"
            )
        if self.network is not None and self.keep_gram:
            raise ValueError("keep_gram without network; set keep_gram = false")
        if self.epsilon is not None and self.delta is not None:
            promised = limit_units(mu_max_string(self.epsilon, self.delta))
            if is_unlimited(self.mu_max) or limit_units(self.mu_max) > promised:
                raise ValueError(
                    "mu_max of no more than epsilon and delta allow; leave it out, and it follows from them"
                )
        self.policy()
        return self

    def policy(self) -> Policy:
        """The limits that the guard enforces."""
        linear = frozenset({"gradient"}) | ({"moment", "statistics"} if self.allow_statistics else set())
        return Policy(
            works=linear if self.network is None else frozenset({"network"}),
            families=frozenset({self.family}),
            public_key=bytes.fromhex(self.public_key),
            recovery_key=None if self.recovery_key is None else bytes.fromhex(self.recovery_key),
            require_sealing=self.require_sealing,
            ledger_id=self.ledger_id,
            mu_max=self.mu_max,
            max_users_per_node=self.max_users_per_node,
            allow_not_private=self.allow_not_private,
            allow_sampling=self.allow_sampling,
            **self.limits.model_dump(exclude_none=True),
        )


def load_settings(path: str | Path) -> NodeSettings:
    """Read a node's TOML file; paths in it come back absolute.

    Raises:
        UmbelError: If it cannot be read or is not as declared; names the file and the key.
    """
    try:
        settings = NodeSettings.model_validate(tomllib.loads(Path(path).read_text("utf-8")))
    except OSError as error:
        raise UmbelError(f"{path}: Expected a node's settings, got {error.strerror}.") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise UmbelError(f"{path}: Expected valid settings, got a problem at {key}: {problem['msg']}.") from error
    except ValueError as error:
        raise UmbelError(f"{path}: Expected TOML in UTF-8, got this problem: {error}.") from error
    return _with_absolute_paths(settings, Path(path).resolve().parent)


def _with_absolute_paths(settings: NodeSettings, folder: Path) -> NodeSettings:
    def absolute(path: str | None, *, but: str = "") -> str | None:
        return path if path in (None, but) else str(folder / str(path))

    data = settings.data
    return settings.model_copy(
        update={
            "store": absolute(settings.store, but=MEMORY),
            "network": absolute(settings.network),
            **{name: absolute(getattr(settings, name)) for name in ("signing_key", "root_certificates", "auth_key")},
            "data": data.model_copy(
                update={
                    "source": absolute(data.source, but="synthetic"),
                    "item_features": absolute(data.item_features),
                    "catalogue": absolute(data.catalogue),
                }
            ),
        }
    )
