"""The exceptions a caller may want to catch, as a tree, each with the command line's exit code.

UmbelError                 2  bad input or configuration
├── DataError              2  a row, column or file of the data is not what was declared
├── BudgetExhausted        3  the next release would exceed the privacy budget
├── VerificationError      4  a signature, chain or digest does not verify
│   └── LedgerCorrupt      4  the ledger cannot be read as a valid sequence of lines
├── Refused                6  a node refused a broadcast, or a server a reply; carries a public code
└── StorageError           7  the disk failed; nothing was released
"""

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
