"""What every side shares: model records, loss families, configuration, data and linear algebra.

It must never know about privacy mechanisms, and only `wire.py` may know Flower.

Shapes in docstrings use one legend: `n` users, `N` examples in all, `m` examples of a user, `d` features,
`r` the rank, `k` the sparsity, `D` coordinates of a contribution, `t` releases.
"""
