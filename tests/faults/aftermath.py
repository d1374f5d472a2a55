"""What a run must have left behind, whenever and however it ended: ledger, releases, nodes and metrics agree."""

import json
from hashlib import sha256
from pathlib import Path

from client.sources import node_data
from client.store import DeviceStore
from client.store_file import FULL
from common.config import load_config
from privacy.audit.verify import Anchor, Verification, verify
from privacy.ledger import PrivacyLedger
from privacy.lines import ZERO_HEAD, chain
from privacy.participation import cost_units, is_noiseless
from server.settings import RunFolder

NODES = 2
SMALL = {
    "data.synthetic.users": 9,
    "data.synthetic.examples": 5,
    "data.synthetic.dimension": 3,
    "model.rank": 1,
    "model.sparsity": 1,
    "training.nodes": NODES,
}
"""A run whose rounds take some ten milliseconds."""


class Aftermath:
    """One run over several lives, and everything that any of them has let out."""

    def __init__(self, out: Path, options: dict[str, object]) -> None:
        """Start with nothing: the first life lays the run out."""
        self.folder = RunFolder(root=out)
        self.options = SMALL | options
        self.ledger = out / "ledger.jsonl"
        self.released: dict[int, str] = {}
        self.anchor: Anchor | None = None

    def arguments(self) -> list[str]:
        """The command line: a new run, or the one that is there."""
        if self.folder.config.exists():
            return ["simulate", "--quiet", "--no-baselines", "--resume", str(self.folder.root)]
        settings = [part for key, value in self.options.items() for part in ("--set", f"{key}={value}")]
        return ["simulate", "--quiet", "--no-baselines", "--out", str(self.folder.root), *settings]

    def lines(self) -> int:
        """Whole lines of the ledger."""
        return self.ledger.read_bytes().count(b"\n") if self.ledger.exists() else 0

    def check(self, *, finished: bool, all_answer: bool = True) -> None:
        """Everything that must hold after any life.

        Args:
            finished: Whether the run came to its end.
            all_answer: Whether nothing kept a node from answering.
        """
        if not self.lines():
            return
        verification = verify(
            self.ledger,
            anchor=self.anchor,
            all_signatures=True,
            release_found=lambda entry: self.digests().get(entry.sequence) == entry.release_digest,
        )
        assert verification.status == "consistent, owner not verified", verification.reason
        self.anchor = Anchor(sequence=verification.sequence, head=verification.head)
        rounds = {entry.sequence: entry for entry in verification.rounds}
        found = self.digests()
        assert found.keys() <= rounds.keys()
        for sequence, digest in found.items():
            assert self.released.setdefault(sequence, digest) == digest
        assert found.keys() == self.released.keys()
        assert not (all_answer and verification.counts.get("ABORT"))
        assert [entry.server_round for entry in rounds.values()] == list(range(1, len(rounds) + 1))
        if rounds:
            self.check_rounds(verification, finished=finished, all_answer=all_answer)

    def check_rounds(self, verification: Verification, *, finished: bool, all_answer: bool) -> None:
        """What the run's own files say, against the ledger."""
        config = load_config(self.folder.config)
        z = str(config.run.noise_multiplier)
        cost = None if is_noiseless(z) else cost_units(z)
        planned = config.training.rounds
        charged = len(verification.rounds)
        assert charged <= planned
        if cost is not None:
            assert verification.spent_units == charged * cost
        metrics = self.folder.metrics.read_bytes() if self.folder.metrics.exists() else b""
        for line in metrics.splitlines():
            numbers = json.loads(line)
            if all_answer:
                assert (numbers["answered"], numbers["refusals"]) == (NODES, {})
        for index in range(NODES):
            if (path := self.folder.nodes / f"node-{index}.sqlite").exists():
                users = node_data(config.data, config.model.family, index, NODES)[0].users
                with DeviceStore.open(path, users) as store:
                    self.check_node(store, users, verification, cost, all_answer=all_answer)
                    if finished:
                        assert store.load_states(users).found.all()
                        assert store.acknowledged(verification.genesis["ledger_id"])[0] == verification.sequence
        if finished:
            assert charged == planned
            assert self.digests().keys() == {entry.sequence for entry in verification.commits}
            assert (self.folder.root / "report.html").exists()
            assert self.folder.ledger_copy.read_bytes() == self.ledger.read_bytes()
            assert not list(self.folder.root.rglob("*.tmp"))

    def check_node(
        self,
        store: DeviceStore,
        users: tuple[str, ...],
        verification: Verification,
        cost: int | None,
        *,
        all_answer: bool,
    ) -> None:
        """The node was charged for every release it is in, for nothing that the ledger has not reserved."""
        ledger_id = verification.genesis["ledger_id"]
        sequence, head = store.acknowledged(ledger_id)
        with PrivacyLedger.open(self.ledger) as ledger:
            assert chain(ZERO_HEAD, ledger.digests_since(-1)[: sequence + 1]) == head
        assert sequence <= verification.sequence
        answered = [
            entry for entry in verification.rounds if store.charged(ledger_id, entry.sequence, users) is not None
        ]
        in_releases = (
            [] if not all_answer else [entry for entry in verification.rounds if entry.sequence in self.released]
        )
        assert {entry.sequence for entry in in_releases} <= {entry.sequence for entry in answered}
        for entry in answered:
            assert store.charged(ledger_id, entry.sequence, users).all()
        spent = FULL if cost is None else len(answered) * cost
        if answered:
            assert store.spent(users).tolist() == [spent] * len(users)

    def digests(self) -> dict[int, str]:
        """SHA-256 of every release that is there."""
        return {int(path.stem): sha256(path.read_bytes()).hexdigest() for path in self.folder.rounds.glob("0*")}
