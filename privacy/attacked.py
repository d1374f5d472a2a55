"""Whether what an attack has shown is of the run that it lies beside, as far as the ledger can say.

Nothing signs the file, so this guards against one that was left over, or copied from somewhere else, and not against
one that was made up: everything that it is compared with can be read in the ledger.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from privacy.accounting import gdp_epsilon
from privacy.audit.verify import Verification
from privacy.lines import heads
from privacy.participation import is_noiseless
from privacy.release_files import EmpiricalAudit
from privacy.rounding import counted, rounded_up

_SLACK = 1e-6  # of a claim: between machines


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """An attack as a report may show it.

    Attributes:
        empirical: The attack, with the ledger's claim and the alarm that follows from it; None where it is not of this
            run.
        remarks: What a reader of it must know: that the run went on since, that it was made against another claim.
        foreign: Why it is not of this run; empty where it is.
    """

    empirical: EmpiricalAudit | None
    remarks: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


def attacked(found: EmpiricalAudit, *, ledger: Path, checked: Verification, run: str | None) -> Attacked:
    """Compare an attack with the ledger and the run that it lies beside.

    Args:
        found: What the file says.
        ledger: The file of lines.
        checked: What they say.
        run: The run that the folder is of; None where nothing says so, as of a ledger's rounds altogether.
    """
    foreign = _other_run(found, checked, run) or _other_past(found, ledger, checked)
    if foreign:
        return Attacked(empirical=None, foreign=foreign)
    multipliers, now = _noise_until(_position(found)[0], checked, run)
    if found.rounds != len(multipliers) or not multipliers:
        said = counted(found.rounds, "round")
        return Attacked(empirical=None, foreign=(f"it says {said} up to its line, the ledger {len(multipliers):,}",))
    if checked.sampled is not None or any(map(is_noiseless, multipliers)):
        return Attacked(empirical=None, foreign=("rounds without noise, and sampled ones, are not attacked",))
    delta, s = float(checked.genesis["delta"]), int(checked.genesis["max_nodes_per_user"])
    claimed = gdp_epsilon(multipliers, found.claimed_delta, s)
    remarks = _other_claim(found, claimed, delta=delta, noise_multiplier=multipliers[0])
    if now > found.rounds:
        remarks.insert(0, f"It was made at round {found.rounds:,} of {now:,}: the run went on since.")
    alarm = any(bound.epsilon > claimed for bound in found.bounds)
    return Attacked(empirical=replace(found, claimed_epsilon=claimed, alarm=alarm), remarks=tuple(remarks))


def _other_run(found: EmpiricalAudit, checked: Verification, run: str | None) -> tuple[str, ...]:
    """What names another run or another ledger."""
    if found.ledger_id is None or found.ledger_head is None:
        return ("it does not say which run it was made on, as of before umbel wrote that down",)
    pairs = (("run", found.run, run), ("ledger_id", found.ledger_id, checked.genesis["ledger_id"]))
    return tuple(f"its {name} is {theirs!r}, here it is {ours!r}" for name, theirs, ours in pairs if theirs != ours)


def _other_past(found: EmpiricalAudit, ledger: Path, checked: Verification) -> tuple[str, ...]:
    """Why the head that it was made at is none that the ledger had."""
    sequence, head = _position(found)
    if sequence > checked.sequence:
        return (f"it was made at line {sequence} of the ledger, which ends at line {checked.sequence}",)
    if _head_at(ledger, sequence) != head:
        return (f"the ledger's head after line {sequence} was {head[:16]}… for it, and is another here",)
    return ()


def _other_claim(found: EmpiricalAudit, claimed: float, *, delta: float, noise_multiplier: str) -> list[str]:
    """In what the claim that it was made against is not the ledger's."""
    remarks = []
    if abs(found.claimed_epsilon - claimed) > _SLACK * claimed:
        remarks.append(
            f"Its file claims ε = {rounded_up(found.claimed_epsilon)} for these rounds, the ledger "
            f"{rounded_up(claimed)}: bounds are compared with the ledger's."
        )
    if found.claimed_delta != delta:
        remarks.append(f"It was made for δ = {rounded_up(found.claimed_delta)}, the ledger's is {rounded_up(delta)}.")
    if found.noise_multiplier != noise_multiplier:
        remarks.append(f"Its file says that z = {found.noise_multiplier}, the ledger that z = {noise_multiplier}.")
    return remarks


def _noise_until(sequence: int, checked: Verification, run: str | None) -> tuple[list[str], int]:
    """z of the rounds that were charged up to a line, and how many there are now."""
    multipliers, now = [], 0
    for entry in checked.rounds if run is None else checked.rounds.of_run(run):
        now += 1
        if entry.sequence <= sequence:
            multipliers.append(entry.event["noise_multiplier"])
    return multipliers, now


def _position(found: EmpiricalAudit) -> tuple[int, str]:
    """The line that it was made after, and the head; a line beyond any ledger where it says neither."""
    sequence, _, head = str(found.ledger_head).partition(":")
    return (int(sequence) if sequence.isdecimal() else 2**63), head


def _head_at(ledger: Path, sequence: int) -> str:
    """The head after a line of a ledger that was verified up to there; empty for one that was lost."""
    with ledger.open("rb") as lines:
        number, head = next(found for found in heads(lines) if found[0] >= sequence)
    return head.hex() if number == sequence else ""
