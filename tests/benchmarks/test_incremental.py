"""What the replay of incremental updates shows: the orderings that the papers' rules rest on."""

import numpy as np

from benchmarks.incremental import FACTORS, METHODS, correlated, drifting, refolded_errors

# deterministic by seed; the margins are several standard errors of 25 replicates


def test_the_full_curvature_is_as_good_as_all_examples():
    """Batch by batch costs at most .5e-3 of log-loss over all at once, at any correlation."""
    for level in (0.0, 0.9):
        found = correlated(level, replicates=25)
        assert (found["full"] - found["batch"]).mean() < 0.5e-3
        assert found["full"].mean() < 8e-3


def test_a_diagonal_is_overconfident_where_features_are_correlated():
    """The less of the curvature is kept the worse, diag(H) more so with correlation; one batch alone is worst."""
    found = correlated(0.9, replicates=25)
    means = [found[name].mean() for name in list(METHODS)[1:]]
    assert means == sorted(means)
    assert means[2] > 1.5 * means[1] > 1.5 * 1.2 * means[0]
    assert (
        found["diagonal-simple, diag(H)"].mean() > 2 * correlated(0.0, replicates=25)["diagonal-simple, diag(H)"].mean()
    )


def test_the_best_forgetting_follows_the_drift():
    """Nothing is to be forgotten without drift, a fifth with mild and half with strong drift."""
    best = [FACTORS[int(np.argmin(drifting(walk, replicates=25)))] for walk in (0.0, 0.08, 0.25)]
    assert best == [1.0, 0.8, 0.5]


def test_refolding_is_nearer_than_what_it_replaces():
    """Refolded posteriors are nearer to the truth than old ones and the prior; with X'DX kept, as near as can be."""
    old, prior, refold, metric, kept, everything = refolded_errors("squared", 0.2)
    assert refold < 0.7 * old < prior
    assert metric < refold
    assert abs(kept - everything) < 1e-6 * everything
