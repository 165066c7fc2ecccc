"""Model sizes under AlphaFold 2's names."""

import dataclasses
import os
import sys
from typing import Any

from ipa_haiku.checks import positive_integer

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
        for name in _SIZES:
            size = positive_integer(f"config.{name}", getattr(self, name))
            object.__setattr__(self, name, size)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> "IPAConfig":
        """Reads the `[ipa]` table of a TOML file such as those in `configs/`.

        Raises:
          ValueError: if the table is missing, a size in it is unknown, missing or not a positive
            integer, naming the file.
          ModuleNotFoundError: on Python 3.10 without the package tomli.
        """
        table = read_toml(path).get("ipa")
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


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not TOML, naming it.
      ModuleNotFoundError: on Python 3.10 without the package tomli.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)} is not TOML: {error}") from error


def as_config(config: Any) -> IPAConfig:
    """The sizes among the attributes of `config`, such as AF2's.

    Raises:
      ValueError: naming the size that is missing or not a positive integer.
    """
    for name in _SIZES:
        if not hasattr(config, name):
            raise ValueError(
                f"config must have the attribute {name}, as `IPAConfig` has, got a "
                f"{type(config).__name__}."
            )
    return IPAConfig(**{name: getattr(config, name) for name in _SIZES})
