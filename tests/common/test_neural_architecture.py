"""Shapes of adapted networks: what everybody can compute of them without torch."""

import json
from dataclasses import replace

import numpy as np
import pytest

from common.architecture import Architecture, Layer
from common.errors import UmbelError


def layer(kind="linear", *, rows=2, columns=3, bias=True, form="matrix", start=0, rank=1, sparsity=2):
    return Layer(
        name="a", kind=kind, start=start, rows=rows, columns=columns, bias=bias, form=form, rank=rank, sparsity=sparsity
    )


def architecture(form="matrix"):
    """A convolution of 4 x (2*3*3), a norm that is not adapted, and an embedding of 7 x 2."""
    convolution = layer("conv2d", rows=4, columns=18, form=form, rank=2)
    words = replace(layer("embedding", rows=7, columns=2, bias=False, form=form, start=84, rank=1), name="w")
    parameters = (("a.weight", (4, 2, 3, 3)), ("a.bias", (4,)), ("n.weight", (8,)), ("w.weight", (7, 2)))
    return Architecture(parameters=parameters, layers=(convolution, words), outputs=3, train_base=True)


def test_neural_order_of_a_wide_layer_is_its_transpose():
    """2 x (3 + 1) is read as 4 x 2: rows of the long side are inputs, and the last is the bias."""
    one = layer()
    assert (one.size, one.d, one.c) == (8, 4, 2)
    assert one.order.tolist() == [0, 3, 1, 4, 2, 5, 6, 7]


def test_neural_order_of_a_tall_layer():
    """3 x (1 + 1) stays as it is, its bias moved beside each row's weight."""
    one = layer(rows=3, columns=1)
    assert (one.d, one.c) == (3, 2)
    assert one.order.tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (4, 4), (4, 3), (1, 1)])
def test_neural_matrix_has_every_entry_once(kind, shape, bias):
    """Both forms hold each entry once, d is the longer side, and `places` undoes `order`."""
    rows, columns = shape
    matrix = layer(kind, rows=rows, columns=columns, bias=bias)
    vector = replace(matrix, form="vector")
    assert matrix.size == vector.size == rows * (columns + bias)
    assert (matrix.d, matrix.c) == (max(rows, columns + bias), min(rows, columns + bias))
    assert (vector.d, vector.c) == (vector.size, 1)
    assert vector.order.tolist() == list(range(vector.size))
    for one in (matrix, vector):
        assert one.order.dtype == np.int64
        assert sorted(one.order.tolist()) == list(range(one.size))
        assert one.order[one.places].tolist() == list(range(one.size))


def test_neural_counts_and_slices():
    """P, D, w and b of a convolution and an embedding, written out."""
    found = architecture()
    assert found.num_parameters == 72 + 4 + 8 + 14
    assert (found.layers[0].d, found.layers[0].c) == (19, 4)
    assert (found.layers[1].d, found.layers[1].c) == (7, 2)
    assert found.shared_size == 98 + 19 * 2 + 7
    assert found.U_slices() == (slice(98, 136), slice(136, 143))
    assert found.w_slices() == (slice(0, 8), slice(8, 10))
    assert (found.rank, found.sparsity, found.personal_numbers) == (10, 4, 18)
    assert found.ratio == 98 / 18
    assert "18 numbers a user against P=98" in found.storage
    assert "d=19 c=4 r=2 k=2" in found.storage


def test_neural_counts_in_vector_form():
    """A layer as one vector has r numbers of w, and U with a row for each entry."""
    found = architecture("vector")
    assert (found.rank, found.shared_size) == (3, 98 + 76 * 2 + 14)


def test_neural_what_is_trained():
    """All of the shared vector, or what comes after the base."""
    found = architecture()
    assert (found.trained_from, found.trained_size) == (0, 143)
    fixed = replace(found, train_base=False)
    assert (fixed.trained_from, fixed.trained_size) == (98, 45)


@pytest.mark.parametrize("form", ["matrix", "vector"])
def test_neural_architecture_comes_back_from_json(form):
    """With the same digest, also when its orders have been computed meanwhile."""
    found = architecture(form)
    assert found.layers[0].order.size == 76
    again = Architecture.decode(json.loads(json.dumps(found.encode())))
    assert again == found
    assert again.digest == found.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": 4},
        {"train_base": False},
        {"layers": (replace(architecture().layers[0], rank=1), architecture().layers[1])},
        {"layers": (replace(architecture().layers[0], form="vector"), architecture().layers[1])},
        {"parameters": (*architecture().parameters[:3], ("x.weight", (7, 2)))},
    ],
)
def test_neural_digest_tells_architectures_apart(changes):
    """Whatever server and nodes have to agree on is in it."""
    assert replace(architecture(), **changes).digest != architecture().digest


@pytest.mark.parametrize(
    "plain",
    [
        {},
        [],
        {**architecture().encode(), "layers": [{"name": "a"}]},
        {**architecture().encode(), "parameters": [["a.weight", "xy"]]},
        {**architecture().encode(), "outputs": None},
    ],
)
def test_neural_architecture_from_something_else(plain):
    """Is an error that says so."""
    with pytest.raises(UmbelError, match="description of a network"):
        Architecture.decode(plain)
