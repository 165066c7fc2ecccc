"""The error budget of results in groups, outputs and gradients."""

import jax
import numpy as np

from ipa_haiku.attention.logits import MASK_PENALTY


def in_logits(gradients):
    """Gradients by name, those of masks in units of the logits, comparable to the others."""
    is_mask = {"q_mask", "k_mask"}
    return {k: x / MASK_PENALTY if k in is_mask else x for k, x in gradients.items()}


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def assert_within_error_budget(fast, reference, exact):
    """Errors are at most twice the reference's, or 2e-7 of the largest array of their group.

    So an array that is exactly zero is judged on the scale of what it is computed from.

    Args:
      fast: a pytree by group.
      reference: the same of what it stands in for.
      exact: the same in float64.
    """
    failures = []
    for group in exact:
        floor = 2e-7 * max(rms(x) for x in jax.tree.leaves(exact[group]))
        leaves = [jax.tree.leaves(tree[group]) for tree in (fast, reference, exact)]
        paths = [path for path, _ in jax.tree.leaves_with_path(exact[group])]
        for path, x, y, z in zip(paths, *leaves, strict=True):
            x, y, z = (np.asarray(a, np.float64) for a in (x, y, z))
            if not rms(x - z) <= max(2 * rms(y - z), floor):
                name = group + jax.tree_util.keystr(path)
                failures.append(f"{name}: {rms(x - z):.1e}, {rms(y - z):.1e}, {floor:.1e}")
    assert not failures, "\n  ".join(["over budget (ours, reference's, floor):", *failures])
