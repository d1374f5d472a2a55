"""A device answers for its users from what it keeps."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.sources import forget
from client.store import DeviceStore
from common.config import DataConfig, FeatureConfig, to_toml
from common.errors import StorageError, UmbelError
from privacy.keys import public_key_hex
from tests.asking import KEY, Asker, node
from tests.populations import draw_model
from umbel.predict import predict, scores

MODEL = draw_model(np.random.default_rng(0), 3, 1)
ROWS = ["ada,0.5,-0.2,4", "ada,0.4,0.1,5", "ada,-0.1,0.2,4.5", "ben,-0.9,0.3,2"]


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    forget()
    yield
    forget()


def table(folder: Path, **changes: Any) -> DataConfig:
    """Two features; the target's range is [1, 5], so 3 is taken off."""
    columns = (FeatureConfig(name="a"), FeatureConfig(name="b"))
    declared = {"source": str(folder / "table.csv"), "features": columns, "target_range": (1.0, 5.0)}
    return DataConfig.model_validate(declared | {"test_fraction": 0.0} | changes)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """The settings of a node that has folded a model in."""
    (tmp_path / "table.csv").write_text("\n".join(["user,a,b,y", *ROWS]) + "\n")
    (tmp_path / "new.csv").write_text("b,a\n0.2,0.1\n-1,1\nmuch,0\n")
    data = table(tmp_path)
    service = node(data, store=str(tmp_path / "node.sqlite"), users=3)
    service.fold_in(*Asker(MODEL, data).fold_in())
    service.close()
    return settings(tmp_path, data)


def settings(folder: Path, data: DataConfig) -> Path:
    """A node.toml for this store and these data."""
    known = {"store": "node.sqlite", "public_key": public_key_hex(KEY), "mu_max": "inf", "allow_not_private": True}
    path = folder / "node.toml"
    path.write_text(to_toml({**known, "users": 3, "data": data.model_dump(exclude_none=True)}))
    return path


def test_answers_are_of_the_users_own_parameters(device: Path) -> None:
    """beta + U w + b of the kept posterior, times the features and their intercept, plus what was taken off."""
    with DeviceStore.open(device.parent / "node.sqlite", ["ada"]) as store:
        theta = store.load_states(["ada"]).with_model(MODEL).theta[0]
    document = predict(device, "ada", device.parent / "new.csv")
    expected = [theta @ [0.1, 0.2, 1.0] + 3, theta @ [1.0, -1.0, 1.0] + 3]
    assert document["source"] == "posterior"
    assert document["scores"][:2] == pytest.approx(expected, rel=1e-12)
    assert abs(expected[0] - (MODEL.beta @ [0.1, 0.2, 1.0] + 3)) > 1e-3


def test_a_row_that_lacks_a_feature_has_no_score(device: Path) -> None:
    """It is named by its number, without its value."""
    document = predict(device, "ada", device.parent / "new.csv")
    assert (document["rows"], document["scores"][2]) == ([2, 3, 4], None)
    assert document["problems"] == ["new.csv, row 4, column 'b': Expected a finite number."]


def test_a_user_of_whom_nothing_is_kept_gets_the_prior(device: Path) -> None:
    """And it is said: what is expected of anybody."""
    document = predict(device, "stranger", device.parent / "new.csv")
    assert document["source"] == "prior"
    assert document["scores"][:2] == pytest.approx(
        [MODEL.beta @ [0.1, 0.2, 1.0] + 3, MODEL.beta @ [1.0, -1.0, 1.0] + 3], rel=1e-12
    )
    with DeviceStore.open(device.parent / "node.sqlite", ()) as store:
        assert not store.known(["stranger"])[0]  # asking takes no place
        store.forget("ada")
    assert predict(device, "ada", device.parent / "new.csv")["source"] == "prior"


def test_a_device_without_store_or_model_says_so(tmp_path: Path) -> None:
    """And makes no store."""
    path = settings(tmp_path, table(tmp_path))
    (tmp_path / "new.csv").write_text("b,a\n0.2,0.1\n")
    with pytest.raises(UmbelError, match="Run umbel node first"):
        predict(path, "ada", tmp_path / "new.csv")
    assert not (tmp_path / "node.sqlite").exists()
    DeviceStore.open(tmp_path / "node.sqlite", ["ada"]).close()
    with pytest.raises(UmbelError, match="Expected a model on this device"):
        predict(path, "ada", tmp_path / "new.csv")


def test_columns_that_are_not_the_models_are_refused(device: Path) -> None:
    """A score from other columns would look like one."""
    data = table(device.parent, target_range=(0.0, 10.0))
    with pytest.raises(UmbelError, match="columns and the target's range of the kept model"):
        predict(settings(device.parent, data), "ada", device.parent / "new.csv")


def test_a_record_that_is_none_is_a_storage_error(device: Path) -> None:
    """The file was written by somebody else."""
    with DeviceStore.open(device.parent / "node.sqlite", ["ada"]) as store:
        digest = store.load_states(["ada"]).model_digest[0].tobytes()
        store.save_model(digest, b"garbage")
    with pytest.raises(StorageError, match="Expected a model"):
        predict(device, "ada", device.parent / "new.csv")


def test_items_are_looked_up_in_the_public_list(tmp_path: Path) -> None:
    """Ratings: one row an item; an item that is not in the list has no score."""
    (tmp_path / "items.csv").write_text("item,p,q\ni1,0.5,1\ni2,-1,0.2\n")
    (tmp_path / "ratings.csv").write_text("user,item,rating\nada,i1,5\nada,i2,1\n")
    (tmp_path / "new.csv").write_text("item\ni2\ni9\n")
    declared = {"source": str(tmp_path / "ratings.csv"), "item_features": str(tmp_path / "items.csv")}
    data = DataConfig.model_validate({**declared, "target_range": (1.0, 5.0), "test_fraction": 0.0})
    service = node(data, store=str(tmp_path / "node.sqlite"), users=1)
    service.fold_in(*Asker(MODEL, data).fold_in())
    service.close()
    document = predict(settings(tmp_path, data), "nobody", tmp_path / "new.csv")
    assert document["scores"] == [pytest.approx(MODEL.beta @ [-1.0, 0.2, 1.0] + 3), None]


def test_a_score_of_the_logistic_family_is_a_probability() -> None:
    """Exact at any margin."""
    X, theta = np.array([[0.0], [1.0], [-1.0], [1000.0], [-1000.0]]), np.array([2.0])
    found = scores(X, theta, family="logistic", target_offset=0.0)
    assert found.tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2)), 1.0, 0.0], abs=1e-15)
    assert scores(X[:2], theta, family="squared", target_offset=3.0).tolist() == [3.0, 5.0]


def test_it_starts_without_flower_and_scipy(device: Path) -> None:
    """It answers on a device in a moment; the whole command is watched."""
    code = (
        "import sys; from umbel.cli import run; "
        f"code = run(['predict', {str(device)!r}, '--user', 'ada', '--input', {str(device.parent / 'new.csv')!r}]); "
        "print(code, [name for name in ('flwr', 'scipy', 'torch', 'server', 'pyarrow', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
