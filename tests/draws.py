"""The error budget over several random draws of unequal conditioning."""

import jax
import numpy as np

from ipa_haiku.testing import assert_within_error_budget


def assert_draws_within_error_budget(fast, reference, exact):
    """Asserts errors of at most twice the reference's over draws, stacked in axis 0 of each array.

    Where layers follow each other, one draw magnifies rounding twenty times as much as another, in
    both computations, and the sum of squares is decided by it and by chance. So each draw is taken
    in units of the errors of both computations together, and counts at most once. All draws in one
    unit, where the worst decides, still have to be within four times.
    """

    def by_error(x, y, z):
        errors = np.sqrt(_norms(x - z) ** 2 + _norms(y - z) ** 2)
        return [a / np.where(errors == 0.0, 1.0, errors) for a in (x, y, z)]

    leaves = [jax.tree.leaves(tree) for tree in (fast, reference, exact)]
    scaled = [by_error(*arrays) for arrays in zip(*leaves, strict=True)]
    tree = jax.tree.structure(exact)
    trees = (jax.tree.unflatten(tree, arrays) for arrays in zip(*scaled))
    assert_within_error_budget(*trees, floor=0.0)
    assert_within_error_budget(fast, reference, exact, factor=4.0)


def _norms(x):
    """Norm of each draw, of as many axes."""
    axes = tuple(range(1, x.ndim))
    return np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=axes, keepdims=True))
