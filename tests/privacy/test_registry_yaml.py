"""An entry for a registry of deployments has the registry's keys, reads back as it was meant, and claims no more."""

import dataclasses
import math
import re

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from privacy.keys import create_key, load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.participation import mu_max_string
from privacy.registry_yaml import TO_FILL_IN, registry_document, to_yaml
from privacy.report import report_of_ledger

SCHEMA = {
    "basic": {
        *("name", "data_curators", "intended_use", "data_product_type", "data_product_region", "description"),
        *("publication_date", "data_product_sector"),
    },
    "dp_variant": {"variant_name", "data_domain", "unprotected_quantities"},
    "privacy_loss": {"privacy_unit", "privacy_unit_details", "privacy_parameters", "privacy_parameters_details"},
    "deployment_model": {"model_name", "actors", "release_type", "data_source_type", "access_type"},
    "accounting": {"post_processing", "composition"},
    "implementation": {"preprocessing_and_hyperparameter_tuning", "mechanisms", "justification"},
    "administrative": {"sources", "notes", "registry_authors"},
}
OPERATOR_S = {
    *("data_curators", "intended_use", "data_product_region", "publication_date", "data_product_sector"),
    *("data_source_type", "justification", "registry_authors"),
}


def ledger_of(root, *, noise="aes-256-ctr"):
    """The report of a ledger with two charged rounds."""
    event = {
        "mechanism": "gaussian",
        "noise_multiplier": "10.000000",
        "clipping_norm": "1.25",
        "grid_scale": 65536,
        "groups": [{"name": "model", "size": 10, "share": "0.8"}, {"name": "scalars", "size": 5, "share": "0.6"}],
        "denominator": 40,
        "noise": noise,
        "sampling": "none",
        "initialization": False,
    }
    create_key(root / "key")
    with PrivacyLedger.create(
        root / "ledger.jsonl",
        population="people",
        epsilon=2.0,
        delta=1e-6,
        mu_max=mu_max_string(2.0, 1e-6, 1),
        max_nodes_per_user=1,
        key=load_key(root / "key"),
    ) as ledger:
        ledger.record_registry(population_size=40, users_per_node=20, digest="0f" * 32)
        ledger.start("r", schedule={"rounds": 2}, configuration_digest="0f" * 32)
        for server_round in (1, 2):
            ledger.reserve("r", server_round, event, invited_users=40)
    return report_of_ledger(root / "ledger.jsonl")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return ledger_of(tmp_path_factory.mktemp("ledger"))


def leaves(document):
    """Names and values that are no mappings; lists are one value."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield name, value


def test_the_entry_has_exactly_the_registry_s_keys(report):
    """Every key of the schema and no other, as a parser of YAML reads it, none of them empty."""
    read = yaml.safe_load(to_yaml(registry_document(report)))
    assert read == registry_document(report)
    assert read.keys() == {"deployment"}
    assert {section: set(keys) for section, keys in read["deployment"].items()} == SCHEMA
    assert read["deployment"]["privacy_loss"]["privacy_parameters"].keys() == {"epsilon", "delta", "rho"}
    assert all(value for _, value in leaves(read))


def test_the_losses_are_the_report_s(report):
    """Epsilon, delta and rho are numbers, those of the whole ledger; the statement is the description."""
    entry = registry_document(report)["deployment"]
    spent = report.spent
    assert spent.epsilon > 0
    assert entry["privacy_loss"]["privacy_parameters"] == {
        "epsilon": spent.epsilon,
        "delta": spent.delta,
        "rho": spent.rho,
    }
    assert entry["basic"]["description"].startswith(report.statement)
    assert "2 Gaussian releases in 1 run" in entry["accounting"]["composition"]
    assert "10.000000" in entry["implementation"]["mechanisms"]
    assert report.verification.head in entry["administrative"]["sources"]


def test_what_only_the_operator_knows_is_marked(report):
    """Exactly those values ask to be filled in, and the file begins by saying so."""
    entry = registry_document(report)
    assert {name for name, value in leaves(entry) if TO_FILL_IN in str(value)} == OPERATOR_S
    assert to_yaml(entry).startswith("#")
    assert TO_FILL_IN in to_yaml(entry).split("deployment:")[0]


@pytest.mark.parametrize("why", ["seeded", "another key"])
def test_nothing_is_claimed_where_nothing_is_promised(tmp_path, why):
    """Seeded noise, or a ledger that does not verify, leaves null in place of every loss."""
    report = ledger_of(tmp_path, noise="seeded (NOT PRIVATE)" if why == "seeded" else "aes-256-ctr")
    if why == "another key":
        other = public_key_hex(Ed25519PrivateKey.from_private_bytes(bytes(32)))
        report = report_of_ledger(tmp_path / "ledger.jsonl", public_key=other)
    entry = yaml.safe_load(to_yaml(registry_document(report)))["deployment"]
    assert entry["privacy_loss"]["privacy_parameters"] == {"epsilon": None, "delta": None, "rho": None}
    assert entry["privacy_loss"]["privacy_parameters_details"].startswith("NOT PRIVATE")
    assert "NOT PRIVATE" in entry["dp_variant"]["variant_name"]


def test_hostile_names_stay_values(tmp_path):
    """A population whose name is YAML is a name."""
    name = 'a"\nbasic: {epsilon: 0}\n# \\ \u2028 \x85 𝕌: - & * !!python/object'
    report = dataclasses.replace(ledger_of(tmp_path), population=name)
    assert yaml.safe_load(to_yaml(registry_document(report)))["deployment"]["basic"]["name"].endswith(name)


values = st.none() | st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.text(), min_size=1)


@given(st.dictionaries(st.sampled_from("abcd"), values | st.dictionaries(st.just("e"), values, min_size=1), min_size=1))
def test_every_value_reads_back(document):
    """Any text, number, null or list comes back from a parser as it went in, of the same kind."""
    read = yaml.safe_load(to_yaml(document))
    assert read == document
    assert [type(value) for _, value in leaves(read)] == [type(value) for _, value in leaves(document)]


def test_small_numbers_are_numbers():
    """A delta without a point before its exponent would be a string to YAML 1.1."""
    text = to_yaml({"delta": 1e-06})
    assert math.isclose(yaml.safe_load(text)["delta"], 1e-6)
    assert re.search(r"delta: 1\.0e-06\n", text)
