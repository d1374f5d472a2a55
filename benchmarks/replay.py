"""Replay: train on the past, then predict each batch of events before learning from it, as arXiv:2010.05154 does.

    python -m benchmarks.replay [--data ../shared/data/ml-100k] [--out replay.html] [--format json]

All ways of keeping a model up to date have the same model (a fixed effect and random effects, see
`benchmarks/replay_streams.py`), start from the same fit of the past and see the same batches in order of time. They
differ in what a batch changes:

- never updated: nothing;
- last batch only: who has events in it is trained on these alone;
- warm start only: the same, but around the last coefficients instead of zero, with the first prior's precision;
- incremental: around the last coefficients, with the precision of all they have seen, which a forgetting factor
  discounts;
- full retraining: everybody is trained on all events so far, from nothing (the cold batch).

An update makes one pass over the types, a training from nothing several (`PASSES`). The precision of the first prior is
chosen for full retraining, the forgetting factor for the incremental update, both by replays inside the past; what is
replayed afterwards chooses nothing. Seconds are of the processor, for learning and not for predicting, on
one thread.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.replay_page import write_page
from benchmarks.replay_streams import Kind, Stream, drifting, movielens
from client.incremental import Examples, Posterior, fresh, update
from common.families import FAMILIES
from common.model import Array, IntArray

FORGETTING = (0.5, 0.8, 0.95, 1.0)
PASSES = 3
PRECISIONS = (1.0, 3.0, 10.0, 30.0)
_FIXED_PRECISION = 1.0
_VALIDATION_BATCHES = 2
Model = tuple[Posterior, ...]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of keeping a model up to date.

    Attributes:
        key: For machines.
        name: For people.
        forgetting: Of an incremental one.
    """

    key: str
    name: str
    forgetting: float | None = None


METHODS = (
    Method(key="never", name="never updated"),
    Method(key="last", name="last batch only"),
    Method(key="warm", name="warm start only"),
    *(Method(key=f"incremental-{f:g}", name=f"incremental, {f:g}", forgetting=f) for f in FORGETTING),
    Method(key="full", name="full retraining"),
)


def nothing(stream: Stream, precisions: Sequence[float]) -> Model:
    """The first prior of every entity."""
    like = stream.kinds[0].features
    return tuple(
        fresh(kind.size, kind.features.shape[1], precision, like=like)
        for kind, precision in zip(stream.kinds, precisions, strict=True)
    )


def scores(kind: Kind, posterior: Posterior, events: IntArray) -> Array:
    """`len(events)`, what an entity type adds to the linear predictors."""
    return np.asarray((kind.X(events) * posterior.mean[kind.entity[events]]).sum(axis=1))


def trained(
    stream: Stream, prior: Model, events: IntArray, *, precisions: Sequence[float], forgetting: float, passes: int
) -> Model:
    """Every type's posterior given the others' scores, one after the other, `passes` times from the same prior."""
    found = list(prior)
    parts = [scores(kind, posterior, events) for kind, posterior in zip(stream.kinds, prior, strict=True)]
    for _ in range(passes):
        for i, kind in enumerate(stream.kinds):
            offset = sum(part for j, part in enumerate(parts) if j != i)
            new = _Events(y=stream.y[events], offset=np.broadcast_to(offset, len(events)), events=events)
            found[i] = _conditioned(
                kind, prior[i], new, family=stream.family, forgetting=forgetting, precision=precisions[i]
            )
            parts[i] = scores(kind, found[i], events)
    return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Events:
    """Events to learn from: their places in the stream, targets, and the score of everything else."""

    events: IntArray
    y: Array
    offset: Array


def _conditioned(
    kind: Kind, prior: Posterior, new: _Events, *, family: str, forgetting: float, precision: float
) -> Posterior:
    """Posteriors of a type after events; entities without any are as they were."""
    mean, H = prior.mean.copy(), prior.precision.copy()
    for entities, at, used in _groups(kind.entity[new.events]):
        found = update(
            Posterior(mean=prior.mean[entities], precision=prior.precision[entities]),
            Examples(
                X=kind.X(new.events[at].ravel()).reshape(*at.shape, -1),
                y=new.y[at],
                weight=used * 1.0,
                offset=new.offset[at],
            ),
            family=FAMILIES[family],
            forgetting=forgetting,
            prior_precision=precision,
        )
        mean[entities], H[entities] = found.posterior.mean, found.posterior.precision
    return Posterior(mean=mean, precision=H)


def _groups(entity: IntArray) -> Iterator[tuple[IntArray, IntArray, Array]]:
    """Entities with similar numbers of events: who, places of their events (padded), and which of these are used."""
    order = np.argsort(entity, kind="stable")
    who, starts, counts = np.unique(entity[order], return_index=True, return_counts=True)
    # at most a quarter of padding
    step = np.maximum(1, 2 ** np.floor(np.log2(counts)).astype(np.int64) // 4)
    lengths = -(-counts // step) * step
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        place = np.arange(length)[None, :]
        used = place < counts[members][:, None]
        yield who[members], order[np.where(used, starts[members][:, None] + place, starts[members][:, None])], used


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """What became of one method.

    Attributes:
        predictions: Linear predictors of all replayed events, each made before the event was learned from.
        seconds: Of learning, for each batch.
    """

    predictions: Array
    seconds: tuple[float, ...]


def replayed(stream: Stream, method: Method, first: Model, precisions: Sequence[float]) -> Replayed:
    """Predict, then learn, batch after batch.

    Args:
        stream: The events.
        method: What a batch changes.
        first: Fit of the past.
        precisions: Of the first prior, for each type.
    """
    model, predictions, seconds = first, [], []
    for number in range(1, len(stream.ends)):
        events = stream.batch(number)
        pairs = zip(stream.kinds, model, strict=True)
        predictions.append(sum(scores(kind, posterior, events) for kind, posterior in pairs))
        started = time.process_time()
        model = learned(stream, method, model, number, precisions)
        seconds.append(time.process_time() - started)
    return Replayed(predictions=np.concatenate(predictions), seconds=tuple(seconds))


def learned(stream: Stream, method: Method, model: Model, number: int, precisions: Sequence[float]) -> Model:
    """The model after batch `number`."""
    events = stream.batch(number)
    if method.key == "never":
        return model
    prior, passes, forgetting = nothing(stream, precisions), 1, 1.0
    match method.key:
        case "full":
            events, passes = np.arange(stream.ends[number]), PASSES
        case "last":
            # who has no events in it keeps what there is
            found = trained(stream, prior, events, precisions=precisions, forgetting=1.0, passes=PASSES)
            return tuple(
                _of_those_in(kind, events, after, before)
                for kind, after, before in zip(stream.kinds, found, model, strict=True)
            )
        case "warm":
            prior = tuple(
                Posterior(mean=now.mean, precision=zero.precision) for now, zero in zip(model, prior, strict=True)
            )
        case _:
            prior, forgetting = model, float(method.forgetting or 1.0)
    return trained(stream, prior, events, precisions=precisions, forgetting=forgetting, passes=passes)


def _of_those_in(kind: Kind, events: IntArray, after: Posterior, before: Posterior) -> Posterior:
    is_in = np.zeros(kind.size, np.bool_)
    is_in[kind.entity[events]] = True
    return after.where(is_in, before)


def log_loss(y: Array, eta: Array) -> float:
    """Mean over examples."""
    return float(FAMILIES["logistic"].loss(eta, y).mean())


def rmse(y: Array, eta: Array) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(((y - eta) ** 2).mean()))


def auc(y: Array, eta: Array) -> float:
    """Probability that an example with y = 1 scores above one with y = 0, ties counting half (Mann and Whitney)."""
    _, place, counts = np.unique(eta, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ones = y > 0.5
    a, b = int(ones.sum()), int((~ones).sum())
    return float((ranks[ones].sum() - a * (a + 1) / 2) / (a * b)) if a and b else float("nan")


METRICS: dict[str, dict[str, Callable[[Array, Array], float]]] = {
    "logistic": {"log_loss": log_loss, "auc": auc},
    "squared": {"rmse": rmse},
}


def chosen(stream: Stream) -> tuple[tuple[float, ...], float, list[dict[str, Any]]]:
    """Precisions of the first prior, a forgetting factor, and all that was tried inside the past.

    The precisions by full retraining on its last fifth; the forgetting factor, which takes time to matter, by updates
    on its last half in batches as long as those of the replay.
    """
    grid = []

    def error(inside: Stream, method: Method, precisions: Sequence[float]) -> float:
        found = replayed(inside, method, fit_of_past(inside, precisions), precisions).predictions
        metric = next(iter(METRICS[stream.family].values()))
        grid.append({"method": method.key, "precisions": list(precisions), "error": metric(inside.replayed_y, found)})
        return float(grid[-1]["error"])

    precisions = (_FIXED_PRECISION, *[PRECISIONS[1]] * (len(stream.kinds) - 1))
    fifth = stream.past(0.2, batches=_VALIDATION_BATCHES)
    for i in range(1, len(stream.kinds)):  # one type after the other
        candidates = [(*precisions[:i], precision, *precisions[i + 1 :]) for precision in PRECISIONS]
        precisions = min(candidates, key=lambda each: error(fifth, METHODS[-1], each))
    half = stream.past(0.5, batches=round(0.5 * stream.ends[0] / (stream.ends[1] - stream.ends[0])))
    incremental = [method for method in METHODS if method.forgetting is not None]
    best = min(incremental, key=lambda method: error(half, method, precisions))
    return precisions, float(best.forgetting or 1.0), grid


def fit_of_past(stream: Stream, precisions: Sequence[float]) -> Model:
    """Trained from nothing on the past."""
    prior = nothing(stream, precisions)
    return trained(stream, prior, stream.batch(0), precisions=precisions, forgetting=1.0, passes=PASSES)


def run(stream: Stream, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All methods on one stream; see `--format json`."""
    precisions, forgetting, grid = chosen(stream)
    progress(f"{stream.name}: precisions {precisions}, forgetting {forgetting:g}")
    first = fit_of_past(stream, precisions)
    start = stream.ends[0]
    y = stream.replayed_y
    results = []
    for method in METHODS:
        found = replayed(stream, method, first, precisions)
        parts = [(stream.ends[i] - start, stream.ends[i + 1] - start) for i in range(len(stream.ends) - 1)]
        results.append(
            {
                "method": method.key,
                "name": method.name,
                "forgetting": method.forgetting,
                "is_chosen": method.forgetting == forgetting,
                "overall": {name: metric(y, found.predictions) for name, metric in METRICS[stream.family].items()},
                "batches": {
                    name: [metric(y[a:b], found.predictions[a:b]) for a, b in parts]
                    for name, metric in METRICS[stream.family].items()
                },
                "seconds": sum(found.seconds),
                "seconds_of_batches": list(found.seconds),
            }
        )
        progress(f"{stream.name}: {method.name} {results[-1]['overall']} {results[-1]['seconds']:.2f} s")
    return {
        "stream": stream.name,
        "about": stream.about,
        "family": stream.family,
        "kinds": [
            {"name": kind.name, "entities": kind.size, "features": kind.features.shape[1], "precision": precision}
            for kind, precision in zip(stream.kinds, precisions, strict=True)
        ],
        "ends": list(stream.ends),
        "forgetting": forgetting,
        "passes": PASSES,
        "results": results,
        "grid": grid,
        "reach": reach(results),
    }


def reach(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the chosen incremental update loses against full retraining, and how many times less time it takes."""
    ours = next(each for each in results if each["is_chosen"])
    full = next(each for each in results if each["method"] == "full")
    lost = {f"{name}_lost": _sign(name) * (ours["overall"][name] - full["overall"][name]) for name in ours["overall"]}
    return {**lost, "times_faster": full["seconds"] / ours["seconds"]}


def _sign(metric: str) -> int:
    return -1 if metric == "auc" else 1


def streams(data: Path | None) -> Iterator[Stream]:
    """What is replayed."""
    if data is not None:
        yield movielens(data)
        yield movielens(data, family="squared")
    for drift in (0.0, 0.2, 0.5):
        yield drifting(drift)


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    """Tables for docs/results.md."""
    lines = []
    for document in documents:
        names = list(document["results"][0]["overall"])
        lines += [
            "",
            f"**{document['stream']}**",
            "",
            f"| model | {' | '.join(names)} | seconds | of full retraining |",
        ]
        lines.append("|--" * (len(names) + 3) + "|")
        full = document["results"][-1]["seconds"]
        for each in document["results"]:
            name = f"**{each['name']}** (chosen)" if each["is_chosen"] else each["name"]
            errors = " | ".join(f"{each['overall'][metric]:.4f}" for metric in names)
            share = f"1/{full / each['seconds']:.0f}" if each["seconds"] > 1e-3 else "–"
            lines.append(f"| {name} | {errors} | {each['seconds']:.2f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Replay all streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ml-100k"), help="folder of MovieLens 100K")
    parser.add_argument("--synthetic", action="store_true", help="only the streams that are made up")
    parser.add_argument("--out", type=Path, help="write a page with the curves here")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    documents = [run(stream, progress) for stream in streams(None if arguments.synthetic else arguments.data)]
    if arguments.out is not None:
        write_page(documents, arguments.out)
    print(
        json.dumps({"benchmark": "replay", "streams": documents}) if arguments.format == "json" else markdown(documents)
    )


def progress(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
