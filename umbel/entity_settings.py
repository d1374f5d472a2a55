"""From the options of `umbel update --init` to a store of entities."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from client.entity_store import INTERCEPT, EntitySettings, EntityStore
from common.errors import DataError, UmbelError
from common.model import Array
from common.tables import as_numbers, as_texts, column_names, read_cells

_COLUMNS = ("feature", "coefficient")


def make_store(
    path: Path, *, features: tuple[str, ...], entity: list[str] | None = None, fixed: Path | None = None, **others: Any
) -> None:
    """Make a store of entities, or check that the one that is there was made alike.

    Args:
        path: The file.
        features: Columns.
        entity: Columns that name the entities.
        fixed: A table of the fixed effect.
        **others: Fields of `EntitySettings`.

    Raises:
        UmbelError: Naming the option that is missing or wrong.
    """
    if not entity or "target" not in others:
        raise UmbelError("Expected --entity and --target with --init, got no such column. Name them.")
    for name in ("prior_precision", "noise_variance"):
        value = others.get(name, 1.0)
        if not 0 < value < math.inf:
            raise UmbelError(f"Expected 0 < {name} < inf, got {name}={value}. Correct --{name.replace('_', '-')}.")
    settings = EntitySettings(entities=tuple(entity), features=features, **others)
    roles = (settings.weight, settings.timestamp, settings.event_id)
    named = [*settings.entities, settings.target, *settings.features, *(role for role in roles if role is not None)]
    if repeated := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        raise UmbelError(f"Expected each column in one role, got {repeated[0]!r} in several. Leave all but one out.")
    if INTERCEPT in settings.features:
        raise UmbelError(f"Expected no feature {INTERCEPT!r}, got one: every event has it. Leave it out.")
    EntityStore.create(path, settings, None if fixed is None else read_fixed(fixed, settings))


def read_fixed(path: Path, settings: EntitySettings) -> Array:
    """`d` coefficients from a table with the columns `feature` and `coefficient`; features without a row have 0.

    Raises:
        DataError: If it cannot be read, or names a feature twice or one that the store has not.
    """
    cells = read_cells(path, _COLUMNS)
    names, values = as_texts(cells.columns[_COLUMNS[0]]), as_numbers(cells.columns[_COLUMNS[1]])
    place = {name: i for i, name in enumerate((INTERCEPT, *settings.features))}
    fixed = np.zeros(settings.dimension)
    seen: set[str] = set()
    for row, name, value in zip(cells.rows.tolist(), names, values.tolist(), strict=True):
        if name not in place or name in seen or math.isnan(value):
            expected = f"a feature of the store, or {INTERCEPT}, once, with a finite coefficient"
            raise DataError(f"{path.name}, row {row}: Expected {expected}. The columns are {column_names(path)}.")
        seen.add(name)
        fixed[place[name]] = value
    return fixed
