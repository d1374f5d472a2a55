"""The public shape of this model's contributions: which groups, how large, with which share of the unit ball."""

import math

from privacy.layout import SCALARS, Group, Layout, grid_scale_for

SCALARS_SHARE = 0.2
"""s_g of the scalars: 4 % of the squared norm, which costs the gradient 2 % of its noise."""


def contribution_layout(dimension: int, rank: int, *, private: bool) -> Layout:
    """Groups of a contribution: the gradient of (U, beta), `d (r+1)` numbers, and the five scalars.

    Shares are decimals of nine places, as the ledger spells them; the model's is what is left, rounded down.
    """
    size = dimension * (rank + 1)
    model_share = math.floor(math.sqrt(1 - SCALARS_SHARE**2) * 1e9) / 1e9
    groups = (
        Group(name="model", size=size, share=model_share),
        Group(name="scalars", size=len(SCALARS), share=SCALARS_SHARE),
    )
    return Layout(groups=groups, grid_scale=grid_scale_for(size + len(SCALARS), private=private))
