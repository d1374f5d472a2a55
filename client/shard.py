"""The users of one node as the solver wants them, kept in memory where they fit and rebuilt each round where not."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from client.batches import Batch, Chunk, cleaned, design_of, form_of, plan_chunks
from client.coins import Coins
from common.data import DataSchema, Population
from common.families import Family
from common.model import IntArray

T = TypeVar("T")
CHUNK_BYTES = 2**22
CACHE_BYTES = 2**28


class Shard:
    """A node's population, cut once into chunks; holds the batches of as many chunks as fit in `cache_bytes`.

    Attributes:
        population: The users and their examples.
        schema: Public facts about the data.
        family: Loss family.
        keep_examples: Whether second moments do not suffice.
    """

    def __init__(
        self,
        population: Population,
        schema: DataSchema,
        family: Family,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        cache_bytes: int = CACHE_BYTES,
        result_bytes: int = 0,
        keep_examples: bool = False,
    ) -> None:
        self.population = cleaned(population, schema)
        self.schema = schema
        self.family = family
        self.keep_examples = keep_examples or family.name != "squared"
        self._chunks = plan_chunks(population.counts, population.dimension, chunk_bytes, result_bytes)
        self._cache: dict[int, Batch] = {}
        self._free_bytes = cache_bytes

    def batches(self) -> Iterator[tuple[Chunk, Batch]]:
        """Every chunk with its batch, in the same order each time."""
        for number, chunk in enumerate(self._chunks):
            yield chunk, self._batch(number)

    def isolated(self, compute: Callable[[Chunk, Batch], T]) -> Iterator[tuple[Chunk, T]]:
        """`compute` for every chunk, with a failure kept to the user that causes it.

        Where making the batch or `compute` raises, each user of the chunk is a chunk of its own; users who raise
        alone are left out. So no user's data can change what is computed for another.
        """
        for number, chunk in enumerate(self._chunks):
            result = _attempt(compute, chunk, partial(self._batch, number))
            if result is not None:
                yield chunk, result
                continue
            for one in _one_by_one(chunk):
                result = _attempt(compute, one, partial(self._build, one))
                if result is not None:
                    yield one, result

    def _batch(self, number: int) -> Batch:
        """The batch of a chunk of the plan, kept if it fits."""
        if number in self._cache:
            return self._cache[number]
        batch = self._build(self._chunks[number])
        if batch.nbytes <= self._free_bytes:
            self._free_bytes -= batch.nbytes
            self._cache[number] = batch
        return batch

    def _build(self, chunk: Chunk) -> Batch:
        design = design_of(self.population, chunk)
        return form_of(design, second_moments_suffice=not self.keep_examples)


def total_contribution(
    shard: Shard,
    contribution: Callable[[Batch], IntArray],
    *,
    size: int,
    admitted: np.ndarray[tuple[int], np.dtype[np.bool_]],
    coins: Coins | None = None,
) -> IntArray:
    """`size` int64, the sum of the clipped integer vectors of the admitted users; the others count as zeros.

    A user who raises contributes zeros, see `Shard.isolated`. With coins those whose coin shows tails count as zeros
    too: a coin is tossed when its user's integers are there, and what is done does not depend on what it shows.

    Args:
        shard: The node's users.
        contribution: `n x size` int64 of a batch, see `client.work`.
        size: Coordinates D.
        admitted: `n` booleans, whose filter allows this release.
        coins: Of a sampled release.
    """

    def chunk_total(chunk: Chunk, batch: Batch) -> IntArray:
        grid, counts = contribution(batch), admitted[chunk.users]
        if coins is not None:
            # a product with every row, so that heads and tails are the same work
            counted: IntArray = ((counts & coins.heads(chunk.users)).astype(np.int64)[:, None] * grid).sum(axis=0)
            return counted
        chunk_sum: IntArray = (grid if counts.all() else grid[counts]).sum(axis=0)
        return chunk_sum

    total = np.zeros(size, np.int64)
    with np.errstate(all="ignore"):  # a user's overflow is that user's zeros, and no warning's business
        for _, chunk_sum in shard.isolated(chunk_total):
            total += chunk_sum
    return total


def _attempt(compute: Callable[[Chunk, Batch], T], chunk: Chunk, batch: Callable[[], Batch]) -> T | None:
    try:
        return compute(chunk, batch())
    except Exception:  # whatever a library raises for one user's numbers
        return None


def _one_by_one(chunk: Chunk) -> Iterator[Chunk]:
    return (Chunk(users=chunk.users[i : i + 1], length=chunk.length) for i in range(len(chunk.users)))
