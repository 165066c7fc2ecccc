"""What to measure: read from `configs/bench_*.toml`, overridden by options, validated."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipa_haiku import IPAConfig
from ipa_haiku.attention.selection import IMPLEMENTATIONS
from ipa_haiku.config import read_toml

CONFIGS = Path(__file__).parents[1] / "configs"

WHATS = ("core", "module", "structure_module")
MODES = ("forward", "grad")
DTYPES = ("float32", "bfloat16")
PEERS = ("alphafold", "alphafold_multimer", "lucidrains", "openfold", "esmfold", "flash_ipa")


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a model, from the tables `[ipa]` and `[model]` of `configs/<name>.toml`."""

    name: str  # of the file
    ipa: IPAConfig  # sizes of the attention module
    variant: str  # "monomer" or "multimer", AF2's two parametrisations
    single_channel: int  # channels of `inputs_1d`, C_s
    pair_channel: int  # channels of `inputs_2d`, C_z
    num_layer: int  # iterations of the structure module
    position_scale: float  # Å in one unit of translation
    pair_rank: int = 0  # R of `inputs_2d` given as factors; 0 for an array

    @property
    def alphafold(self) -> str:
        """Name of AF2's own module of this variant, of `PEERS`."""
        return "alphafold" if self.variant == "monomer" else "alphafold_multimer"

    @classmethod
    def from_name(cls, name: str) -> "Model":
        """Reads `configs/<name>.toml`.

        Raises:
          ValueError: if there is no such model, naming those there are.
        """
        known = sorted(p.stem for p in CONFIGS.glob("*.toml") if not p.stem.startswith("bench_"))
        if name not in known:
            raise ValueError(f"model: unknown {name!r}, known are {', '.join(known)}.")
        path = CONFIGS / f"{name}.toml"
        return cls(name, IPAConfig.from_toml(path), **read_toml(path)["model"])


@dataclasses.dataclass(frozen=True)
class Bench:
    """One sweep.

    Raises:
      ValueError: naming the field whose value is of no use.
    """

    sizes: tuple[int, ...]  # numbers of residues, N
    model: str = "af2_monomer"  # name of a model in `configs/`
    # Of `WHATS`: the attention core alone, the Haiku module, AF2's structure module with it.
    what: tuple[str, ...] = ("module",)
    # Of `MODES`: forward; value and gradient of `problems.squared_distance` with respect to
    # parameters, inputs and frames.
    modes: tuple[str, ...] = MODES
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    peers: tuple[str, ...] = ("alphafold",)  # of `PEERS`: other people's implementations
    devices: tuple[int, ...] = ()  # numbers of them, over which the module is measured, too
    # 0 to give `inputs_2d` as an array; R to give it as factors of rank R, with each of
    # `implementations` measured twice: on the factors, and on the array multiplied out of them.
    pair_rank: int = 0
    dtype: str = "float32"  # of activations and weights; frames are always float32
    repeats: int = 10  # timed samples of each row
    # Calls shorter than this are repeated within a sample, as the layers of a model follow each
    # other. Single calls of a few milliseconds would mostly tell how fast the operating system
    # wakes threads.
    min_sample_ms: float = 20.0
    # Largest N at which results are compared with float64; beyond it, with `reference` in float32.
    float64_max_size: int = 512
    seed: int = 0  # of inputs and weights

    def __post_init__(self) -> None:
        for name in ("sizes", "what", "modes", "implementations", "peers", "devices"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise ValueError(f"{name}: must be a list, got {values!r}.")
            object.__setattr__(self, name, tuple(values))
        _check_counts("sizes", self.sizes)
        _check_counts("devices", self.devices, may_be_empty=True)
        _check_counts("repeats", [self.repeats])
        for name in ("pair_rank", "float64_max_size", "seed"):
            _check_counts(name, [getattr(self, name)], least=0)
        if not isinstance(self.min_sample_ms, int | float) or self.min_sample_ms < 0:
            raise ValueError(
                f"min_sample_ms: must be a number of at least 0, got {self.min_sample_ms!r}."
            )
        _check_names("what", self.what, WHATS)
        _check_names("modes", self.modes, MODES)
        _check_names("implementations", self.implementations, IMPLEMENTATIONS, may_be_empty=True)
        _check_names("peers", self.peers, PEERS, may_be_empty=True)
        _check_names("dtype", [self.dtype], DTYPES)
        obstacles = [self.obstacle(what) for what in self.what]
        if all(obstacles):
            raise ValueError(f"what: {self.what[0]} cannot be measured: {obstacles[0]}.")
        if self.pair_rank and self.peers:
            raise ValueError("pair_rank: must be 0 with peers, which take arrays only.")
        if not (self.implementations or self.peers or self.devices):
            raise ValueError("implementations: there is nothing to measure, and no peers either.")

    def obstacle(self, what: str) -> str | None:
        """Why `what` is left out with these settings; None if it is not."""
        variant = Model.from_name(self.model).variant
        if what != "structure_module":
            return None
        if variant != "monomer":
            return f"it needs a monomer model, {self.model} is a {variant}"
        if self.dtype != "float32":
            return "AlphaFold 2's structure module takes float32 only"
        return "AlphaFold 2's structure module takes arrays only" if self.pair_rank else None

    def sized_model(self) -> Model:
        """The model of that name, with the pair representation as it is given here."""
        return dataclasses.replace(Model.from_name(self.model), pair_rank=self.pair_rank)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **overrides: Any) -> "Bench":
        """Reads the `[bench]` table of a file, replacing what `overrides` gives.

        Raises:
          OSError: if the file cannot be read.
          ValueError: if the file or an override says something of no use, naming it.
        """
        table = read_toml(path).get("bench")
        if table is None:
            raise ValueError(f"{os.fspath(path)} has no [bench] table.")
        unknown = sorted(table.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"[bench] in {os.fspath(path)}: unknown {', '.join(unknown)}.")
        if "sizes" not in table | overrides:
            raise ValueError(f"[bench] in {os.fspath(path)}: sizes is missing.")
        return cls(**(table | overrides))


def _check_counts(
    name: str, values: Sequence[Any], least: int = 1, may_be_empty: bool = False
) -> None:
    if not values and not may_be_empty:
        raise ValueError(f"{name}: must not be empty.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: must be integers of at least {least}, got {value!r}.")


def _check_names(name: str, values: Sequence[Any], known: Any, may_be_empty: bool = False) -> None:
    if not values and not may_be_empty:
        raise ValueError(f"{name}: must not be empty.")
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: unknown {value!r}, known are {', '.join(known)}.")
