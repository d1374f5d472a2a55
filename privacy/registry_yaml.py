"""A report as an entry of a registry of deployments, in the schema of OpenDP and NIST, as YAML.

What the ledger knows is filled in; what only the operator knows says so, and is theirs to fill in before publishing.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from privacy.promise import lost_as_well
from privacy.report import PrivacyReport
from privacy.rounding import counted, rounded_up

TO_FILL_IN = "TO BE FILLED IN BY THE OPERATOR"
_HEADER = (
    "# An entry for a registry of differential-privacy deployments (schema of OpenDP and NIST), made from a ledger.",
    f"# Replace every “{TO_FILL_IN}” before publishing.",
)
_MOST_MULTIPLIERS = 5
_BMP = 0xFFFF
_LATIN = 0xFF


def registry_document(report: PrivacyReport) -> dict[str, Any]:
    """The entry.

    Its losses are null where nothing is promised, or where the ledger does not verify.
    """
    return {
        "deployment": {
            "basic": _basic(report),
            "dp_variant": {
                "variant_name": "Approximate DP" if _is_promised(report) else "none: NOT PRIVATE",
                "data_domain": f"All training examples of one {report.unit}; features and target in declared ranges.",
                "unprotected_quantities": " ".join(report.unprotected),
            },
            "privacy_loss": _privacy_loss(report),
            "deployment_model": _deployment_model(report),
            "accounting": _accounting(report),
            "implementation": _implementation(report),
            "administrative": _administrative(report),
        }
    }


def to_yaml(document: Mapping[str, Any]) -> str:
    """A nested mapping of strings, numbers, null and lists of strings, as YAML that every parser reads alike."""
    return "\n".join((*_HEADER, *_lines(document, 0))) + "\n"


def _basic(report: PrivacyReport) -> dict[str, Any]:
    return {
        "name": f"Shared model of {report.population}",
        "data_curators": [TO_FILL_IN],
        "intended_use": f"{TO_FILL_IN}: what the model is for",
        "data_product_type": "Machine learning model",
        "data_product_region": TO_FILL_IN,
        "description": (
            f"{report.statement} A model with a shared and a personal part: the shared part is learned from all "
            "users by federated learning and released; the personal part, low-rank weights and a sparse correction, is "
            "fitted on each user's node and stays there."
        ),
        "publication_date": f"{TO_FILL_IN}: YYYY-MM-DD; the ledger was last written on {report.verification.last_time}",
        "data_product_sector": TO_FILL_IN,
    }


def _privacy_loss(report: PrivacyReport) -> dict[str, Any]:
    spent, promised = report.spent, _is_promised(report)
    details = (
        f"Epsilon by {_formula(report)}, for the whole ledger; the budget is epsilon {_budget(report)} at "
        f"delta {report.budget_delta:g}. mu-GDP with mu = {rounded_up(spent.mu)}{_no_coins(report)}; "
        f"under replace-one, epsilon is {rounded_up(spent.replace_one_epsilon)}. "
        f"Finite precision adds {rounded_up(report.delta_fp)} to delta."
        if promised
        else f"NOT PRIVATE: {report.statement}"
    )
    return {
        "privacy_unit": f"{report.unit.capitalize()}-level",
        "privacy_unit_details": (
            f"Neighbours differ in the contributions of one {report.unit}, against zeros "
            f"({report.neighboring_relation}); the number of users is public. One {report.unit}'s data may be on up "
            f"to {counted(report.max_nodes_per_user, 'node')}."
        ),
        "privacy_parameters": {
            "epsilon": spent.epsilon if promised else None,
            "delta": spent.delta if promised else None,
            "rho": spent.rho if promised else None,
        },
        "privacy_parameters_details": details,
    }


def _formula(report: PrivacyReport) -> str:
    return (
        "privacy-loss distributions of Poisson-sampled releases" if report.is_sampled else "the exact Gaussian formula"
    )


def _no_coins(report: PrivacyReport) -> str:
    return ", as rho, without counting on sampling" if report.is_sampled else ""


def _took_part(report: PrivacyReport) -> str:
    if report.is_sampled:
        return (
            "contributed to each round of the sampled run by the toss of a coin on a device of their own, with "
            "amplification by Poisson sampling for its whole schedule, fixed beforehand, and to all other releases"
        )
    return "contributed to all of them, without amplification by sampling"


def _deployment_model(report: PrivacyReport) -> dict[str, Any]:
    return {
        "model_name": "Central",
        "actors": " ".join(f"{row.who}: {row.sees} {row.means}" for row in report.who_sees_what),
        "release_type": "Many releases",
        "data_source_type": f"{TO_FILL_IN}: Static or Dynamic",
        "access_type": "Non-interactive",
    }


def _accounting(report: PrivacyReport) -> dict[str, Any]:
    return {
        "post_processing": (
            "Every step of the server is computed from noised sums and public constants alone. Personal parts are "
            "fitted on the node to its own user's data under the released model, and are not released."
        ),
        "composition": (
            f"Adaptive composition of {counted(report.num_rounds, 'Gaussian release')} in "
            f"{counted(len(report.runs), 'run')}{lost_as_well(report.num_lost)}, for a "
            f"{report.unit} who {_took_part(report)}. "
            "A release is charged to a signed ledger before anything is asked of a node, "
            "and stays charged; a filter on each node stops the contributions of a user whose own limit is reached."
        ),
    }


def _implementation(report: PrivacyReport) -> dict[str, Any]:
    counts = Counter(facts.noise_multiplier for facts in report.rounds)
    found = sorted(counts, key=float)
    listed = ", ".join(found) if len(found) <= _MOST_MULTIPLIERS else f"{found[0]} to {found[-1]}"
    sources = ", ".join(sorted({facts.noise for facts in report.rounds})) or "none yet"
    return {
        "preprocessing_and_hyperparameter_tuning": report.tuning,
        "mechanisms": (
            "Each user's vector is clipped to an L2 ball and rounded to an integer grid within it; the server sums "
            f"over nodes and adds one Gaussian vector per release, on the same grid. "
            f"Noise multipliers: {listed or 'none yet'}. Source of the noise: {sources}."
        ),
        "justification": f"{TO_FILL_IN}: why this unit, budget and model of trust",
    }


def _administrative(report: PrivacyReport) -> dict[str, Any]:
    checked = report.verification
    return {
        "sources": (
            f"Ledger {report.ledger_id} with public key {checked.public_keys[-1]} and head "
            f"{checked.sequence}:{checked.head}; report.html and report.json beside this file."
        ),
        "notes": (
            f"Verification of the ledger: {checked.status}. Written by umbel {report.versions['umbel']} from public "
            f"files alone. What a signature cannot show: {' '.join(report.signature_limits)}"
        ),
        "registry_authors": [TO_FILL_IN],
    }


def _is_promised(report: PrivacyReport) -> bool:
    return not report.not_private and report.verification.status != "failed"


def _budget(report: PrivacyReport) -> str:
    return f"{report.budget_epsilon:g}" if math.isfinite(report.budget_epsilon) else "none"


def _lines(document: Mapping[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(value, depth + 1)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{indent}{key}:"
            yield from (f"{indent}  - {_scalar(each)}" for each in value)
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _scalar(value: str | float | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    text = repr(value)
    # 1e-06 is a string to parsers of YAML 1.1: a float needs its point
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _escaped(letter: str) -> str:
    """A character between double quotes: what is not printable by its number."""
    if letter in '"\\':
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code <= _LATIN else f"\\u{code:04x}" if code <= _BMP else f"\\U{code:08x}"
