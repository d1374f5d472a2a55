"""A node's own configuration: what it says holds, and what it cannot mean is said with the key's name."""

from pathlib import Path
from typing import Any

import pytest

from client.settings import NodeSettings, load_settings
from common.errors import UmbelError
from privacy.participation import mu_max_string

BASE = 'store = "store/node.sqlite"\npublic_key = "' + "0" * 64 + '"\n'
DATA = '[data]\nsource = "table.csv"\nitem_features = "items.csv"\ncatalogue = "/public/items.txt"\n'


def written(folder: Path, text: str) -> Path:
    """A node.toml."""
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """A folder that is copied to a device works wherever it is put."""
    keys = 'mu_max = "1"\nsigning_key = "signing.key"\nauth_key = "auth.key"\nroot_certificates = "ca.crt"\n'
    settings = load_settings(written(tmp_path, BASE + keys + DATA))
    assert settings.store == str(tmp_path / "store" / "node.sqlite")
    assert (settings.signing_key, settings.auth_key) == (str(tmp_path / "signing.key"), str(tmp_path / "auth.key"))
    assert settings.root_certificates == str(tmp_path / "ca.crt")
    assert (settings.data.source, settings.data.item_features) == (
        str(tmp_path / "table.csv"),
        str(tmp_path / "items.csv"),
    )
    assert settings.data.catalogue == "/public/items.txt"


def test_what_is_no_path_stays(tmp_path: Path) -> None:
    """A store in memory, data that are drawn, and keys that are not given."""
    settings = load_settings(
        written(tmp_path, BASE.replace("store/node.sqlite", ":memory:") + 'mu_max = "1"\n[data]\n')
    )
    assert (settings.store, settings.data.source) == (":memory:", "synthetic")
    assert settings.signing_key is None
    assert settings.root_certificates is None


def test_the_limit_follows_from_the_owners_words(tmp_path: Path) -> None:
    """Epsilon at delta, unless mu_max is given, which may be less and not more."""
    words = "epsilon = 8\ndelta = 1e-6\n"
    limit = mu_max_string(8.0, 1e-6)
    assert load_settings(written(tmp_path, BASE + words + DATA)).mu_max == limit
    lower = load_settings(written(tmp_path, BASE + words + 'mu_max = "0.5"\n' + DATA))
    assert lower.mu_max == lower.policy().mu_max == "0.5"
    for more in ("1.6", "inf"):
        with pytest.raises(UmbelError, match="no more than epsilon and delta allow"):
            load_settings(written(tmp_path, BASE + words + f'mu_max = "{more}"\n' + DATA))


def test_the_policy_table_reaches_the_guard(tmp_path: Path) -> None:
    """What it leaves out is as the guard has it."""
    table = '[policy]\nmax_dimension = 20\nmin_noise_multiplier = "2.5"\nmax_clipping_norm = 3.0\n'
    policy = load_settings(written(tmp_path, BASE + 'mu_max = "1"\n' + DATA + table)).policy()
    assert (policy.max_dimension, policy.min_noise_multiplier, policy.max_clipping_norm) == (20, "2.5", 3.0)
    assert policy.max_rank == 64


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "mu_max"),
        ('mu_max = "1"\nusers = 0\n', "users"),
        ('mu_max = "1"\npoll_seconds = 0\n', "poll_seconds"),
        ('mu_max = "1"\npartition = 2\npartitions = 2\n', "partition below partitions"),
        ('mu_max = "1"\nrecovery_key = "abc"\n', "recovery_key"),
        ('mu_max = "1"\nbundle_hashes = ["abc"]\n', "bundle_hashes"),
        ('mu_max = "1"\nmax_contributions = -1\n', "max_contributions"),
        ('mu_max = "many"\n', "mu_max"),
        ('mu_max = "1"\nfamily = "logistic"\nkeep_gram = true\n', "keep_gram with squared loss only"),
        ('mu_max = "1"\nserver_may_do_anything = true\n', "server_may_do_anything"),
        ('epsilon = "much"\ndelta = 1e-6\n', "mu_max"),
        ("epsilon = -1\ndelta = 1e-6\n", "epsilon"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, text: str, named: str) -> None:
    """With the file and the key."""
    with pytest.raises(UmbelError, match=named) as refused:
        load_settings(written(tmp_path, BASE + text + DATA))
    assert "node.toml" in str(refused.value)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ('min_noise_multiplier = "0.01"', "min_noise_multiplier|0.05"),
        ("min_clipping_norm = 4.0\nmax_clipping_norm = 3.0", "clipping_norm"),
        ("max_rank = 0", "max_rank"),
        ("max_epsilon = 1", "max_epsilon"),
    ],
)
def test_a_policy_that_cannot_be_is_named(tmp_path: Path, table: str, named: str) -> None:
    """When the settings are read, and not in the first round."""
    with pytest.raises(UmbelError, match=named):
        load_settings(written(tmp_path, BASE + 'mu_max = "1"\n' + DATA + f"[policy]\n{table}\n"))


def test_what_a_simulation_writes_is_read_back(tmp_path: Path) -> None:
    """All keys with their values."""
    from common.config import DataConfig, to_toml

    known: dict[str, Any] = {"store": "/s/node-{partition}.sqlite", "public_key": "0" * 64, "mu_max": "inf"}
    settings = NodeSettings(**known, data=DataConfig())
    text = to_toml(settings.model_dump(exclude_none=True, by_alias=True))
    assert load_settings(written(tmp_path, text)) == settings
