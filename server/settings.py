"""What a training run is, resolved from its folder; below this, functions take the numbers they use."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from common.config import Config, load_config
from common.data import DataSchema
from common.errors import UmbelError
from server.checkpoint import load_schema
from server.networks import NetworkStart, read_network_start
from server.start import StartModel, read_start


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The places of a run's files.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.toml"

    @property
    def schema(self) -> Path:
        """Public facts about the data."""
        return self.root / "schema.safetensors"

    @property
    def start(self) -> Path:
        """The released model that the run starts from, if it does; its digest is in the run's START line."""
        return self.root / "start.safetensors"

    @property
    def network(self) -> Path:
        """The network that the run trains, as it starts, if it trains one; its digest is in the START line."""
        return self.root / "network.safetensors"

    @property
    def registry(self) -> Path:
        """Nodes that may be invited; its digest is in the run's START line."""
        return self.root / "registry.json"

    @property
    def checkpoints(self) -> Path:
        """The server's states."""
        return self.root / "checkpoints"

    @property
    def release(self) -> Path:
        """What may be published: models, noised sums, the ledger's copy, the report."""
        return self.root / "release"

    @property
    def rounds(self) -> Path:
        """The noised sums, by sequence number of the ledger line that paid for them."""
        return self.release / "rounds"

    @property
    def model(self) -> Path:
        """The last released model."""
        return self.release / "model.safetensors"

    @property
    def ledger_copy(self) -> Path:
        """The ledger from GENESIS to the run's last line."""
        return self.release / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """A line of public numbers a round."""
        return self.release / "metrics.jsonl"

    @property
    def outcome(self) -> Path:
        """How the ServerApp ended, of its last start."""
        return self.root / "outcome.json"

    @property
    def evaluation(self) -> Path:
        """What a simulation computes from raw data: not to be published."""
        return self.root / "evaluation"

    @property
    def timings(self) -> Path:
        """Seconds that each round took: they depend on the data, so they are not published."""
        return self.evaluation / "timings.jsonl"

    @property
    def nodes(self) -> Path:
        """Settings and stores of a simulation's nodes: what stays on devices."""
        return self.root / "nodes"


@dataclass(frozen=True, kw_only=True)
class LedgerPlace:
    """A ledger and what lies beside it.

    Attributes:
        ledger: The lines.
    """

    ledger: Path

    @property
    def key(self) -> Path:
        """The private key that signs lines and broadcasts."""
        return self.ledger.with_suffix(".key")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A run, ready to start or to go on.

    Attributes:
        run: Its name in the ledger.
        folder: Where its files are.
        place: Its ledger.
        config: The resolved configuration.
        schema: Public facts about the data.
        noise_multiplier: z of each release as the ledger spells it; "0" without noise.
        configuration_digest: SHA-256 of config.toml, hex.
        start: The released model that it starts from, if any.
        network: The network that it trains, if any.
    """

    run: str
    folder: RunFolder
    place: LedgerPlace
    config: Config
    schema: DataSchema
    noise_multiplier: str
    configuration_digest: str
    start: StartModel | None = None
    network: NetworkStart | None = None


def load_run(root: Path) -> RunSettings:
    """Read a run folder as `umbel simulate` or `umbel train` laid it out.

    Raises:
        UmbelError: If a file is missing or not as declared.
    """
    folder = RunFolder(root=root)
    config = load_config(folder.config)
    if config.run.name is None or config.run.noise_multiplier is None or config.run.ledger is None:
        raise UmbelError(
            f"Expected {folder.config} with run.name, run.ledger and run.noise_multiplier, got one without. "
            "Start runs with `umbel simulate` or `umbel train`."
        )
    return RunSettings(
        run=config.run.name,
        folder=folder,
        place=LedgerPlace(ledger=Path(config.run.ledger)),
        config=config,
        schema=load_schema(folder.schema),
        noise_multiplier=config.run.noise_multiplier,
        configuration_digest=sha256(folder.config.read_bytes()).hexdigest(),
        start=None if config.training.start is None else read_start(folder.start),
        network=None if config.network.module is None else read_network_start(folder.network),
    )
