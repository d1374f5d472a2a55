"""What a node answers for its own users."""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from client.incremental import predict as posterior_prediction
from client.incremental import thompson_scores
from client.kept_model import KeptModel
from client.personal_update import Personal, coordinates, from_state, released_prior
from client.store import DeviceStore
from common.errors import UmbelError
from common.loading import InputEncoder
from common.model import Array, IntArray
from common.streaming import EventSource
from umbel.event_rows import Rows, numbered
from umbel.node_rows import NodeReader
from umbel.node_state import NodeState
from umbel.predict import Answers, Question, expected, rows_at_once


class NodeAnswers:
    """A node's store."""

    def __init__(self, state: NodeState) -> None:
        """Read the newest model.

        Raises:
            UmbelError: If there is none, or it is of other columns than those that are declared.
        """
        self._state, self._encoder = state, InputEncoder(state.settings.data)
        newest = state.store.load_model()
        if newest is None:
            raise UmbelError(
                "Expected a model on this device, got none yet. It comes with the end of a run: "
                "keep umbel node running."
            )
        self._newest = state.check(KeptModel.decode(newest))
        self.family, self.run = self._newest.family, self._newest.run

    def answers(self, source: EventSource, question: Question) -> Iterator[Answers]:
        """As `umbel.predict.Answering`."""
        settings, schema = self._state.settings, self._state.schema
        reader = NodeReader(
            settings.data, schema, settings.family, self._encoder, source, targets=False, user=question.user
        )
        size = rows_at_once(schema.dimension)
        for piece in source.pieces(reader.columns, rows=size):
            yield self._piece(reader.read(piece.cells), piece.cells.rows, question)

    def _piece(self, rows: Rows, numbers: IntArray, question: Question) -> Answers:
        eta, stddev, drawn = np.zeros(numbers.size), np.zeros(numbers.size), np.zeros(numbers.size)
        known = np.zeros(numbers.size, np.bool_)
        users, code = numbered(rows.names[0])
        order = np.argsort(code, kind="stable")
        ends = np.cumsum(np.bincount(code, minlength=len(users)))
        for user, at in zip(users, np.split(order, ends[:-1]), strict=True):
            personal, kept, known[at] = self._personal(user)
            X = rows.X[at]
            theta = personal.theta(kept.model)[0]
            eta[at] = drawn[at] = (X * theta).sum(axis=1)
            if not (question.uncertainty or question.seed is not None):
                continue
            c, offset = coordinates(X[None], kept.model, personal.support), (X * kept.model.beta).sum(axis=1)
            if question.uncertainty:
                stddev[at] = posterior_prediction(personal.posterior, c).stddev[0]
            if question.seed is not None:
                normal = _normal(question.seed, user, personal.posterior.mean.shape[1])
                drawn[at] = thompson_scores(personal.posterior, c, normal, offset)[0]
        offset_of_target = self._state.schema.target_offset
        return Answers(
            row=numbers,
            usable=rows.usable,
            known=known,
            score=expected(eta, self.family, offset_of_target),
            stddev=stddev,
            drawn=expected(drawn, self.family, offset_of_target),
            problems=rows.problems,
        )

    def _personal(self, user: str) -> tuple[Personal, KeptModel, bool]:
        """What is kept of a user, or the newest model's prior, and which it is."""
        store: DeviceStore = self._state.store
        if store.known([user])[0]:
            states = store.load_states([user])
            record = store.load_model(states.model_digest[0].tobytes()) if states.found[0] else None
            if record is not None:
                kept = self._state.check(KeptModel.decode(record))
                return from_state(states.with_model(kept.model), kept.model, share=states.share), kept, True
        return released_prior(self._newest.model, 1, sparsity=0), self._newest, False


def _normal(seed: bytes, user: str, size: int) -> Array:
    key = int.from_bytes(blake2b(user.encode(), digest_size=16, key=seed).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal((1, size))
