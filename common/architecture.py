"""The shape of a network with low-rank plus sparse personal layers, as everybody may know it; nothing of torch.

For every adapted layer l, Theta_il = base_l + U_l W_il + B_il (arXiv:2210.03505): U_l of `d x r` is shared, W_il of
`r x c` and B_il with at most k nonzeros are personal. A layer's weight and bias are taken together as one matrix of
`out x (in + 1)`; its form says how that is read as `d x c`:

    matrix   d is the longer side, c the shorter: the published form
    vector   d is the number of entries, c = 1: theta_i = beta + U w_i + b_i with theta the layer as one vector

The shared part is one vector: all parameters of the module in its own order (the base), then U_l of each layer by
rows. A user's W_il by rows, layer after layer, are that user's w; positions of b count in the base.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import numpy as np

from common.errors import UmbelError
from common.model import IntArray
from common.records import canonical_json

Form = Literal["vector", "matrix"]
Kind = Literal["linear", "conv2d", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An adapted layer.

    Attributes:
        name: Of the submodule, as in `named_modules`.
        kind: What it computes.
        start: Where its weight begins in the base; its bias, if any, follows.
        rows: Rows of the matrix (outputs, or words of an embedding).
        columns: Columns of the weight alone.
        bias: Whether a bias makes one more column.
        form: How the matrix is read as `d x c`.
        rank: r.
        sparsity: k.
    """

    name: str
    kind: Kind
    start: int
    rows: int
    columns: int
    bias: bool
    form: Form
    rank: int
    sparsity: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.rows * (self.columns + self.bias)

    @property
    def d(self) -> int:
        """Rows of U."""
        return self.size if self.form == "vector" else max(self.rows, self.columns + self.bias)

    @property
    def c(self) -> int:
        """Columns of W."""
        return self.size // self.d

    @cached_property
    def order(self) -> IntArray:
        """`d c`, which entry of the base (from `start`) each entry of the `d x c` matrix is, by rows."""
        flat = np.arange(self.rows * self.columns).reshape(self.rows, self.columns)
        if self.bias:
            flat = np.concatenate([flat, flat.size + np.arange(self.rows)[:, None]], axis=1)
        if self.form == "vector":
            return np.arange(self.size)
        return (flat if flat.shape[0] == self.d else flat.T).reshape(-1).astype(np.int64)

    @cached_property
    def places(self) -> IntArray:
        """`size`, where each entry of the base is in the `d x c` matrix, by rows: the inverse of `order`."""
        return np.argsort(self.order, kind="stable")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network's parameters and which of its layers are adapted, how.

    Attributes:
        parameters: Name and shape of each parameter of the module, in its order.
        layers: The adapted ones, in order of `start`.
        outputs: Numbers that the network gives for an example.
        train_base: Whether the base is learned too; otherwise it stays as it was at the start.
    """

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[Layer, ...]
    outputs: int
    train_base: bool

    @property
    def num_parameters(self) -> int:
        """P, all parameters of the module: what a fine-tuned copy would keep of a user."""
        return sum(math.prod(shape) for _, shape in self.parameters)

    @property
    def shared_size(self) -> int:
        """D, numbers that the server sends: the base and every U."""
        return self.num_parameters + sum(layer.d * layer.rank for layer in self.layers)

    @property
    def trained_from(self) -> int:
        """Where the trained part of the shared vector begins; what is before stays as it is."""
        return 0 if self.train_base else self.num_parameters

    @property
    def trained_size(self) -> int:
        """Numbers of the shared part that are learned, and so the size of a user's gradient."""
        return self.shared_size - self.trained_from

    @property
    def rank(self) -> int:
        """Numbers in a user's w: r c of every layer."""
        return sum(layer.rank * layer.c for layer in self.layers)

    @property
    def sparsity(self) -> int:
        """Largest number of nonzeros in a user's b, of all layers."""
        return sum(layer.sparsity for layer in self.layers)

    @property
    def personal_numbers(self) -> int:
        """What is kept of a user: w, and for b a place and a value each."""
        return self.rank + 2 * self.sparsity

    @property
    def ratio(self) -> float:
        """How many times smaller that is than a fine-tuned copy of the network."""
        return self.num_parameters / max(self.personal_numbers, 1)

    @property
    def storage(self) -> str:
        """The storage in one line."""
        layers = ", ".join(
            f"{layer.name}: {layer.kind} {layer.rows} x {layer.columns + layer.bias}, d={layer.d} c={layer.c} "
            f"r={layer.rank} k={layer.sparsity}"
            for layer in self.layers
        )
        return (
            f"{self.personal_numbers} numbers a user against P={self.num_parameters} of a fine-tuned copy: "
            f"{self.ratio:.0f} times fewer ({layers})"
        )

    def U_slices(self) -> tuple[slice, ...]:
        """Where each layer's U is in the shared vector."""
        slices, start = [], self.num_parameters
        for layer in self.layers:
            slices.append(slice(start, start + layer.d * layer.rank))
            start += layer.d * layer.rank
        return tuple(slices)

    def w_slices(self) -> tuple[slice, ...]:
        """Where each layer's W is in a user's w."""
        slices, start = [], 0
        for layer in self.layers:
            slices.append(slice(start, start + layer.rank * layer.c))
            start += layer.rank * layer.c
        return tuple(slices)

    def encode(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "parameters": [[name, list(shape)] for name, shape in self.parameters],
            "layers": [asdict(layer) for layer in self.layers],
            "outputs": self.outputs,
            "train_base": self.train_base,
        }

    @classmethod
    def decode(cls, plain: Mapping[str, Any]) -> "Architecture":
        """Inverse of `encode`.

        Raises:
            UmbelError: If it has none.
        """
        try:
            return cls(
                parameters=tuple((str(name), tuple(map(int, shape))) for name, shape in plain["parameters"]),
                layers=tuple(Layer(**layer) for layer in plain["layers"]),
                outputs=int(plain["outputs"]),
                train_base=bool(plain["train_base"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UmbelError("Expected the description of a network, got something else. Restore the file.") from error

    @property
    def digest(self) -> str:
        """SHA-256, hex, of what server and nodes have to agree on."""
        return sha256(canonical_json(self.encode())).hexdigest()
