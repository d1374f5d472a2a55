"""The exceptions a caller may want to catch, as a tree, each with the command line's exit code.

UmbelError                 2  bad input or configuration
├── DataError              2  a row, column or file of the data is not what was declared
├── BudgetExhausted        3  the next release would exceed the privacy budget
├── VerificationError      4  a signature, chain or digest does not verify
│   └── LedgerCorrupt      4  the ledger cannot be read as a valid sequence of lines
├── Refused                6  a node refused a broadcast, or a server a reply; carries a public code
└── StorageError           7  the disk failed; nothing was released
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class UmbelError(Exception):
    """Bad input. The message says what was expected, the name, the value and the remedy."""

    exit_code: ClassVar[int] = 2


class DataError(UmbelError):
    """A row, column or file of the data is not what was declared."""


class BudgetExhausted(UmbelError):
    """The next release would exceed the privacy budget; nothing was asked of any client."""

    exit_code: ClassVar[int] = 3


class VerificationError(UmbelError):
    """A signature, chain or digest does not verify."""

    exit_code: ClassVar[int] = 4


class LedgerCorrupt(VerificationError):
    """The ledger cannot be read as a valid sequence of lines."""


class Refused(UmbelError):
    """A message was refused for a reason that depends on public facts only, named by `code`."""

    exit_code: ClassVar[int] = 6

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class StorageError(UmbelError):
    """A write to disk failed; what was being released was not released."""

    exit_code: ClassVar[int] = 7


REFUSALS: Mapping[str, str] = MappingProxyType(
    {
        "malformed": "The message is not the canonical encoding of what it should be.",
        "protocol": "The message is of another protocol version.",
        "signature": "The message or its ledger line was not signed by the key this node trusts.",
        "ledger_unknown": "The message charges a ledger other than the one this node is pinned to.",
        "ledger_gap": "Ledger lines since the last one this node acknowledged are missing.",
        "ledger_fork": "The ledger differs from what this node acknowledged before.",
        "ledger_rollback": "The ledger ends before a line that this node acknowledged.",
        "ledger_restore": "The RESTORE line was not signed by the recovery key that this node trusts.",
        "replayed": "The ledger line was answered before.",
        "sealing": "The reply was not sealed for this release by this node.",
        "node_unknown": "The node is not in the registry, or one of its name has answered already.",
        "node_signature": "The reply was not signed with the key that the registry has of the node.",
        "policy_sampling": "The release is sampled in a way this node does not accept, or not as its run was started.",
        "policy_noise": "The release has less noise than this node accepts.",
        "policy_clipping": "The clipping norm is outside the bounds of this node.",
        "policy_shape": "The computation, or the layout of its contribution, is not one this node accepts.",
        "policy_work": "The contribution would be made of something that this node does not give.",
        "policy_not_private": "The noise is absent or seeded, which this node accepts in simulations only.",
        "policy_columns": "The model is of other features, or of another range of the target, than the node's data.",
        "policy_sealing": "The contribution would travel unsealed, which this node does not accept.",
        "policy_bundle": "The run's bundle is not one of those that this node's operator allows.",
        "policy_users": "The node hosts more users than its policy allows in one sum.",
        "deadline": "The deadline has passed or is too far away.",
        "purpose": "The message asks for something this node does not do.",
        "storage": "The node could not store what has to be on disk before it answers.",
        "busy": "The node is at work on another message.",
        "unavailable": "Flower could not reach the node, or lost its reply.",
        "client_error": "The client ended without an answer.",
        "error": "The node failed for a reason that it does not tell.",
    }
)
"""What each code of a `Refused` means. The codes are public; nothing else about a refusal leaves a node."""
