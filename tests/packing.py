"""Several proteins as the segments of one call, for the tests: packing and taking apart again."""

from typing import NamedTuple

import jax
import numpy as np

BY_QUERY = ("q_scalar", "q_point", "q_mask")
BY_KEY = ("k_scalar", "k_point", "v_scalar", "v_point", "k_mask")

# Of pairs between proteins, which nothing may see: finite, and far from what is drawn.
GARBAGE = 100.0


class Packed(NamedTuple):
    queries: list[np.ndarray]  # where the queries of each protein are
    keys: list[np.ndarray]
    q_segment_ids: np.ndarray
    k_segment_ids: np.ndarray

    def rows(self, x):
        """Of an array of queries [Nq, ...], those of each protein."""
        return [x[q] for q in self.queries]

    def gradients(self, gradients):
        """From gradients of packed arrays to those of each protein; of parameters, the sum."""
        parts = {
            name: self.rows(x) if name in BY_QUERY else [x[k] for k in self.keys]
            for name, x in gradients.items()
            if name in BY_QUERY + BY_KEY
        }
        z = gradients["inputs_2d"]
        parts["inputs_2d"] = [z[np.ix_(q, k)] for q, k in zip(self.queries, self.keys)]
        return parts | {name: x for name, x in gradients.items() if name not in parts}


def pack(proteins, rng):
    """From `IPAInputs` with the same parameters to one with segments, and a `Packed`.

    The residues of the proteins are shuffled among each other.
    """
    segment_of = {}
    for what in ("q_mask", "k_mask"):
        sizes = [len(getattr(x, what)) for x in proteins]
        # Neither small nor in order.
        ids = np.repeat([7 - 1000 * i for i in range(len(proteins))], sizes).astype(np.int32)
        segment_of[what] = ids[rng.permutation(len(ids))]
    queries, keys = (
        [np.flatnonzero(ids == 7 - 1000 * i) for i in range(len(proteins))]
        for ids in segment_of.values()
    )
    packed = Packed(queries, keys, *segment_of.values())

    def place(name, where):
        arrays = [np.asarray(getattr(x, name)) for x in proteins]
        return np.concatenate(arrays)[np.argsort(np.concatenate(where))]

    first = proteins[0].inputs_2d
    inputs_2d = np.full(
        (*map(len, segment_of.values()), first.shape[-1]), GARBAGE, np.asarray(first).dtype
    )
    for q, k, x in zip(queries, keys, proteins):
        inputs_2d[np.ix_(q, k)] = x.inputs_2d
    inputs = proteins[0]._replace(
        **{name: place(name, queries) for name in BY_QUERY},
        **{name: place(name, keys) for name in BY_KEY},
        inputs_2d=inputs_2d,
        q_segment_ids=packed.q_segment_ids,
        k_segment_ids=packed.k_segment_ids,
    )
    return inputs, packed


def merge(results):
    """Of (outputs, gradients) of each protein, lists of outputs and `Packed.gradients`."""
    outputs, gradients = zip(*results)
    merged = {
        name: [x[name] for x in gradients]
        if name in (*BY_QUERY, *BY_KEY, "inputs_2d")
        else sum(x[name] for x in gradients)
        for name in gradients[0]
    }
    return jax.tree.map(np.asarray, ([list(x) for x in zip(*outputs)], merged))
