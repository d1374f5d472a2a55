"""The users of one node as the solver wants them, kept in memory where they fit and rebuilt each round where not."""

from collections.abc import Callable, Iterator

import numpy as np

from client.batches import Batch, Chunk, cleaned, design_of, form_of, plan_chunks
from client.contribution import contribute
from client.personalize import WHILE_TRAINING, personalize
from common.data import DataSchema, Population
from common.families import Family
from common.model import Array, IntArray, SharedModel
from privacy.layout import Layout

CHUNK_BYTES = 2**22
CACHE_BYTES = 2**28


class Shard:
    """A node's population, cut once into chunks; holds the batches of as many chunks as fit in `cache_bytes`.

    Attributes:
        population: The users and their examples.
        schema: Public facts about the data.
        family: Loss family.
    """

    def __init__(
        self,
        population: Population,
        schema: DataSchema,
        family: Family,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.population = cleaned(population, schema)
        self.schema = schema
        self.family = family
        self._chunks = plan_chunks(population.counts, population.dimension, chunk_bytes)
        self._cache: dict[int, Batch] = {}
        self._free_bytes = cache_bytes

    def batches(self) -> Iterator[tuple[Chunk, Batch]]:
        """Every chunk with its batch, in the same order each time."""
        for number, chunk in enumerate(self._chunks):
            yield chunk, self._cache.get(number) or self._build(number, chunk)

    def _build(self, number: int, chunk: Chunk) -> Batch:
        batch = self.batch_of(chunk)
        if batch.nbytes <= self._free_bytes:
            self._free_bytes -= batch.nbytes
            self._cache[number] = batch
        return batch

    def batch_of(self, chunk: Chunk) -> Batch:
        """The batch of any chunk of this shard's users."""
        design = design_of(self.population, chunk)
        return form_of(design, second_moments_suffice=self.family.name == "squared")


def total_contribution(
    shard: Shard,
    model: SharedModel,
    metric: Array,
    *,
    sparsity: int,
    clipping_norm: float,
    layout: Layout,
    admitted: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> IntArray:
    """`D` int64, the sum of the clipped integer vectors of the admitted users; the others count as zeros.

    A chunk that raises is computed again one user at a time, and a user that raises alone contributes zeros, so
    that no user's data can change another's integers.

    Args:
        shard: The node's users.
        model: The prior of this round.
        metric: `d x d`, the public metric.
        sparsity: Cap on nonzeros of b while training.
        clipping_norm: C.
        layout: Groups and grid.
        admitted: `n` booleans, whose filter allows this release.
    """

    def integers(batch: Batch) -> IntArray:
        solution = personalize(batch, model, family=shard.family, sparsity=sparsity, least_probability=WHILE_TRAINING)
        grid: IntArray = contribute(
            batch,
            solution,
            model,
            metric,
            family=shard.family,
            sparsity=sparsity,
            clipping_norm=clipping_norm,
            layout=layout,
        )
        return grid

    total = np.zeros(layout.size, np.int64)
    with np.errstate(all="ignore"):  # a user's overflow is that user's zeros, and no warning's business
        for chunk, batch in shard.batches():
            grid, counts = _isolated(integers, shard, chunk, batch, layout.size), admitted[chunk.users]
            total += (grid if counts.all() else grid[counts]).sum(axis=0)
    return total


def _isolated(integers: Callable[[Batch], IntArray], shard: Shard, chunk: Chunk, batch: Batch, size: int) -> IntArray:
    """`n x D`, the users' integers, with a failure kept to the user that causes it."""
    try:
        return integers(batch)
    except Exception:  # whatever a library raises for one user's numbers
        if len(chunk.users) == 1:
            return np.zeros((1, size), np.int64)
    alone = (Chunk(users=chunk.users[i : i + 1], length=chunk.length) for i in range(len(chunk.users)))
    return np.concatenate([_isolated(integers, shard, one, shard.batch_of(one), size) for one in alone])
