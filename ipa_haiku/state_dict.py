"""State dicts of PyTorch: where a module is in one, and its tensors as NumPy arrays."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# The last part of the key by which a module is found, and what reads the layouts that have it.
HALLMARKS = {
    "head_weights": "`from_openfold` and `from_framediff` read",
    "point_weights": "`from_lucidrains` reads",
    "trainable_point_weights": "`from_omegafold` and `from_helixfold` read",
}
_DEPTH = 4  # of mappings in a checkpoint


def take_module(
    tensors: Mapping[str, Any], prefix: str | None, hallmark: str
) -> tuple[str, dict[str, np.ndarray]]:
    """Takes the tensors of one module out of a state dict.

    Args:
      tensors: a state dict of the module or of a whole model.
      prefix: of the module's keys, with or without a dot at its end; None means the only place
        with the hallmark.
      hallmark: what the key of the module's point weights ends with, of `HALLMARKS`.

    Returns:
      What the module's keys begin with, and its tensors under their whole keys.

    Raises:
      KeyError: if there is no such module, or more than one.
      TypeError: naming a tensor that NumPy cannot hold.
      ValueError: if the state dict is nested in what is given.
    """
    if prefix is None:
        start = _find_start(tensors, hallmark)
    else:
        start = start_of(prefix)
        if start + hallmark not in tensors:
            refuse_nested(tensors, hallmark)
        if not any(_is_below(key, start) for key in tensors):
            raise KeyError(f"no key begins with {start!r}")
    below = {str(key): x for key, x in tensors.items() if _is_below(key, start)}
    return start, {key: to_numpy(key, x) for key, x in below.items()}


def start_of(prefix: str) -> str:
    """What keys begin with, for a `prefix` with or without a dot at its end."""
    return f"{prefix.removesuffix('.')}." if prefix else ""


def starts_of(tensors: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What comes before each hallmark, and the hallmark, in the order of the keys."""
    keys = [(key, _last(key)) for key in tensors if _last(key) in HALLMARKS]
    return [(key.removesuffix(hallmark), hallmark) for key, hallmark in keys]


def _find_start(tensors: Mapping[str, Any], hallmark: str) -> str:
    found = starts_of(tensors)
    starts = [start for start, name in found if name == hallmark]
    if len(starts) == 1:
        return starts[0]
    keys = [start + hallmark for start in starts]
    hint = ": `prefix` says which" if keys else ""
    if not keys:
        refuse_nested(tensors, hallmark)
        others = [f"{start}{name}, which {HALLMARKS[name]}" for start, name in found[:1]]
        hint = "".join(f", but {other}" for other in others)
    raise KeyError(f"one key {hallmark} expected, found {keys}{hint}")


def refuse_nested(tensors: Mapping[str, Any], *hallmarks: str) -> None:
    """Raises a ValueError that tells in which mapping there is a module, if it is in an inner one.

    Such are checkpoints with the state dict under `model`, `state_dict` or `ema`.
    """
    paths = list(_inner_paths(tensors, hallmarks))
    if paths:
        where = " or ".join(f"checkpoint{path}" for path in paths)
        raise ValueError(f"the tensors are in a mapping inside of the given one: pass {where}.")


def _inner_paths(
    tensors: Mapping[str, Any], hallmarks: tuple[str, ...], depth: int = _DEPTH
) -> Iterator[str]:
    for key, inner in tensors.items():
        if isinstance(inner, Mapping) and depth:
            if any(_last(k) in hallmarks for k in inner):
                yield f"[{key!r}]"
            else:
                for path in _inner_paths(inner, hallmarks, depth - 1):
                    yield f"[{key!r}]{path}"


def _last(key: Any) -> str:
    return str(key).rpartition(".")[2]


def _is_below(key: Any, start: str) -> bool:
    return str(key).startswith(start)


def to_numpy(key: str, tensor: Any) -> np.ndarray:
    """An array of NumPy, JAX or torch as NumPy's.

    Raises:
      TypeError: naming the key, if NumPy cannot hold it.
    """
    try:
        if hasattr(tensor, "detach"):  # torch's, on any device
            tensor = tensor.detach().cpu().numpy()
        return np.asarray(tensor)
    except TypeError as error:
        raise TypeError(f"{key}: {error}") from error
