"""Model sizes under AlphaFold 2's names."""

import dataclasses
import operator
import os
import tomllib
from typing import Any, Self

_SIZES = (
    "num_head",
    "num_scalar_qk",
    "num_scalar_v",
    "num_point_qk",
    "num_point_v",
    "num_channel",
)


@dataclasses.dataclass(frozen=True)
class IPAConfig:
    """Sizes of one Invariant Point Attention module; the defaults are AlphaFold 2's.

    The attributes are those of AF2's `config.model.heads.structure_module`, so that AF2's own
    `ConfigDict` (or dataclass) serves wherever an `IPAConfig` does.

    Attributes:
      num_head: heads, H.
      num_scalar_qk: scalar channels of queries and keys per head, C.
      num_scalar_v: scalar channels of values per head, Cv.
      num_point_qk: points of queries and keys per head, P.
      num_point_v: points of values per head, Pv.
      num_channel: channels of the output.

    Raises:
      ValueError: if a size is not a positive integer, naming it.
    """

    num_head: int = 12
    num_scalar_qk: int = 16
    num_scalar_v: int = 16
    num_point_qk: int = 4
    num_point_v: int = 8
    num_channel: int = 384

    def __post_init__(self) -> None:
        check_config(self)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the `[ipa]` table of a TOML file such as those in `configs/`.

        Raises:
          ValueError: if the table is missing, a size in it is unknown, missing or not a positive
            integer, naming the file.
        """
        with open(path, "rb") as file:
            table = tomllib.load(file).get("ipa")
        if table is None:
            raise ValueError(f"{os.fspath(path)} has no [ipa] table.")
        if table.keys() != set(_SIZES):
            unknown, missing = (
                sorted(table.keys() - set(_SIZES)),
                sorted(set(_SIZES) - table.keys()),
            )
            raise ValueError(f"[ipa] in {os.fspath(path)}: unknown {unknown}, missing {missing}.")
        try:
            return cls(**table)
        except ValueError as error:
            raise ValueError(f"[ipa] in {os.fspath(path)}: {error}") from error


def check_config(config: Any) -> None:
    """Checks that `config` has every size of `IPAConfig` as a positive integer.

    Raises:
      ValueError: naming the size that is missing or not a positive integer.
    """
    for name in _SIZES:
        if not hasattr(config, name):
            raise ValueError(
                f"config must have the attribute {name}, as `IPAConfig` has, got a "
                f"{type(config).__name__}."
            )
        check_positive_integer(f"config.{name}", getattr(config, name))


def check_positive_integer(name: str, value: Any, least: int = 1) -> None:
    """Checks that a value is an integer, Python's or NumPy's, and not too small.

    Raises:
      ValueError: naming it.
    """
    kind = "a positive integer" if least == 1 else f"an integer, at least {least}"
    try:
        is_size = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        is_size = False
    if not is_size:
        raise ValueError(f"{name} must be {kind}, got {value!r}.")
