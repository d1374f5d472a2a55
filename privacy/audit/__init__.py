"""Verification of ledgers and attacks on the mechanism; reads files, needs no Flower and no data.

`audit` and `audit_together` are for notebooks: what `umbel audit` says of one target, or of several, as a dictionary.
"""

from privacy.audit.composition import audit_together
from privacy.audit.findings import audit

__all__ = ["audit", "audit_together"]
