"""The algorithms that umbel is compared with, on its own mechanism and accountant, so that only the algorithm differs.

Each file is one rival: what its users send, what its server does with the noised mean, what stays with a user. All are
for squared loss. Every release is `privacy.mechanism.release` of integers clipped per user, with the noise that the
exact accountant asks for, in full participation, over the same denominator: all users.
"""

from benchmarks.rivals import (
    alone,
    amht_lrs,
    centaur,
    fedavg,
    fedrep,
    full_covariance,
    ridge_around_global,
    umbel_itself,
)
from benchmarks.rivals.rival import Rival

RIVALS: dict[str, Rival] = {
    rival.key: rival
    for rival in (
        umbel_itself.DEFAULTS,
        umbel_itself.TUNED,
        fedavg.GLOBAL,
        fedavg.FINE_TUNED,
        centaur.RIVAL,
        amht_lrs.RIVAL,
        fedrep.RIVAL,
        ridge_around_global.RIVAL,
        alone.RIVAL,
        full_covariance.RIVAL,
    )
}
"""By the key of their cells."""
