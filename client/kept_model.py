"""A released model as a device keeps it beside the posteriors that were computed with it."""

from dataclasses import dataclass

from common.errors import StorageError, UmbelError
from common.model import SharedModel
from common.records import decode, encode


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptModel:
    """What is needed to answer for a user without the server.

    Attributes:
        model: The prior.
        family: Loss family.
        schema: `DataSchema.digest` of the data it is for, hex.
        run: Which run released it.
        sequence: Last ledger line at the time.
    """

    model: SharedModel
    family: str
    schema: str
    run: str
    sequence: int

    def encode(self) -> bytes:
        """Canonical bytes."""
        variances = {"b_variance": self.model.b_variance, "noise_variance": self.model.noise_variance}
        origin = {"family": self.family, "schema": self.schema, "run": self.run, "sequence": self.sequence}
        return encode(variances | origin, {"beta": self.model.beta, "U": self.model.U})

    @classmethod
    def decode(cls, data: bytes) -> "KeptModel":
        """Inverse of `encode`.

        Raises:
            StorageError: If the bytes are no such record.
        """
        try:
            header, arrays = decode(data)
            variances = {name: float(header[name]) for name in ("b_variance", "noise_variance")}
            return cls(
                model=SharedModel(beta=arrays["beta"], U=arrays["U"], **variances),
                family=str(header["family"]),
                schema=str(header["schema"]),
                run=str(header["run"]),
                sequence=int(header["sequence"]),
            )
        except (UmbelError, KeyError, TypeError, ValueError) as error:
            raise StorageError("Expected a model in the device store, got something else. Restore the file.") from error
