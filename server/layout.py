"""The public shape of contributions: which groups, how large, with which share of the unit ball."""

import math

from common.task import Work
from privacy.layout import Group, Layout, grid_scale_for, group_sizes

SCALARS_SHARE = 0.2
"""s_g of the scalars: 4 % of the squared norm, which costs the rest 2 % of its noise."""


def contribution_layout(dimension: int, rank: int, *, private: bool, work: Work = "gradient") -> Layout:
    """Groups, shares and grid of a contribution.

    Shares are decimals of nine places, as the ledger spells them. What the scalars leave is split evenly among the
    other groups, rounded down.

    Args:
        dimension: Number of features d.
        rank: Columns r of U.
        private: Whether there will be noise.
        work: What the contribution is made of.
    """
    sizes = group_sizes(work, dimension, rank)
    share = math.floor(math.sqrt((1 - SCALARS_SHARE**2) / (len(sizes) - 1)) * 1e9) / 1e9
    groups = tuple(
        Group(name=name, size=size, share=SCALARS_SHARE if name == "scalars" else share) for name, size in sizes.items()
    )
    return Layout(groups=groups, grid_scale=grid_scale_for(sum(sizes.values()), private=private))
