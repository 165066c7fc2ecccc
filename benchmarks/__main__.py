"""`python -m benchmarks`: see `--help`."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax

from benchmarks import cases, checks, cost, demo, machine, plot, report, results, structure
from benchmarks.cases import Bench, Model
from benchmarks.peers import Checkouts
from benchmarks.results import Results
from benchmarks.runner import Runner

_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


# What argparse reads values by, and calls them if it cannot.


def names(text: str) -> tuple[str, ...]:
    """A list of names, or none of them."""
    return () if text == "none" else tuple(text.split(","))


def integers(text: str) -> tuple[int, ...]:
    """A list of integers."""
    return tuple(int(x) for x in text.split(","))


def fraction(text: str) -> float:
    """A number of at least 0."""
    if not 0 <= float(text) < float("inf"):
        raise ValueError
    return float(text)


_SWEEP: dict[str, tuple[str, Any, str]] = {
    "config": ("FILE", str, "the sweep: configs/bench_*.toml, bench_quick.toml unless given"),
    "model": ("NAME", str, "sizes: configs/NAME.toml"),
    "sizes": ("N,...", integers, "numbers of residues"),
    "implementations": (
        "NAME,...", names, f"of this project: {', '.join(cases.IMPLEMENTATIONS)}; or none",
    ),
    "peers": ("NAME,...", names, f"other people's: {', '.join(cases.PEERS)}; or none"),
    "openfold": ("PATH", str, "a checkout of OpenFold; adds the peer openfold"),
    "flash-ipa": ("PATH", str, "a checkout of FlashIPA; adds the peer flash_ipa"),
    "modes": (
        "MODE,...", names,
        "forward; grad: value and gradient of a squared distance to a random target",
    ),
    "what": (
        "PART,...", names,
        "module: the Haiku module; structure_module: AlphaFold 2's structure module with the Haiku "
        "module in it, left out for other types than float32, multimers and factors; core: the "
        "attention function",
    ),
    "dtype": ("TYPE", str, "of activations and weights: float32, bfloat16"),
    "pair-rank": ("R", int, "give inputs_2d as factors of rank R; 0: as an array"),
    "devices": ("D,...", integers, "the module with rows over so many devices, beside the others"),
    "repeats": ("R", int, "timed samples of each row"),
    "seed": ("S", int, "of inputs and weights"),
}  # fmt: skip
_OTHERS: dict[str, tuple[str, Any, str]] = {
    "structure": (
        "FILE", str, "demonstrate on this PDB or mmCIF file instead of the protein shipped",
    ),
    "chain": ("NAME", str, "its chain (default: A)"),
    "out": ("FILE", str, "write the results as JSON, after each group of rows"),
    "plot": ("FILE", str, "draw time and memory against N (.png, .pdf, .svg)"),
    "compare": ("OLD", str, "say what got slower or larger than in this JSON file"),
    "margin": (
        "F", fraction,
        "fraction by which a median must grow, with quartiles apart, to count as slower "
        "(default: 0.1)",
    ),
}  # fmt: skip


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m benchmarks",
        description="Demonstrates Invariant Point Attention on a real protein, then measures time, "
        "memory and error of this project's implementations and of other people's.",
        epilog="Lists are separated by commas. A result is wrong, and gets no time, if it is off "
        f"by more than a fixed limit and {checks.TIMES_OWN_ERROR:.0f} times what AlphaFold 2 is "
        "off by. Exit status: 0; 1 if --compare found something; 2 for a wrong option; 130 after "
        "Ctrl-C, which keeps what was measured.",
    )
    sweep = parser.add_argument_group("what to measure (each overrides the configuration file)")
    for group, options in (sweep, _SWEEP), (parser, _OTHERS):
        for name, (metavar, read, text) in options.items():
            group.add_argument(f"--{name}", metavar=metavar, type=read, help=text)
    parser.add_argument(
        "--update-readme", metavar="FILE", nargs="?", const="README.md",
        help="put the table between the benchmark markers of a Markdown file (README.md)",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--cost", action="store_true",
        help="measure nothing: compile the modules for an NVIDIA H200 and a TPU v5e, which need "
        "not be there, and print what the programs would need",
    )  # fmt: skip
    source.add_argument(
        "--from-json", metavar="FILE",
        help="measure nothing: take the results of an earlier --out",
    )  # fmt: skip
    config = str(cases.CONFIGS / "bench_quick.toml")
    parser.set_defaults(config=config, chain="A", margin=0.1)
    return parser


def _read(options: argparse.Namespace) -> None:
    """Checks all that the options name before anything is measured, and adds what they stand for.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if an option or what it names is of no use, saying why.
    """
    for path in filter(None, (options.out, options.plot)):
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path}: there is no such directory.")
    if options.plot:
        plot.check_format(options.plot)
    if options.update_readme:
        report.around_markers(options.update_readme)
    options.checkouts = Checkouts(options.openfold, options.flash_ipa)
    options.checkouts.check()
    options.bench = _bench(options)
    options.backbone = (
        structure.read_structure(options.structure, options.chain)
        if options.structure
        else structure.read_shipped()
    )
    options.found = results.read(options.from_json) if options.from_json else None
    options.old = results.read(options.compare) if options.compare else None


def _bench(options: argparse.Namespace) -> Bench:
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Bench)}
    overrides: dict[str, Any] = {name: x for name, x in given.items() if x is not None}
    bench = Bench.from_toml(options.config, **overrides)
    added = [name for name, path in options.checkouts._asdict().items() if path is not None]
    return dataclasses.replace(bench, peers=tuple(dict.fromkeys((*bench.peers, *added))))


def _measure(options: argparse.Namespace) -> Results:
    """Demonstrates and measures, printing as it goes; Ctrl-C ends it with what there is."""
    bench: Bench = options.bench
    if bench.devices:  # of no effect on other platforms than CPUs
        jax.config.update("jax_num_cpu_devices", max(bench.devices))
    runner = Runner(bench, machine.describe(bench.dtype), options.checkouts)
    found = runner.results

    def save() -> None:
        if options.out:
            found.write(options.out)

    print(report.machine(found), end="\n\n", flush=True)
    try:
        model = Model.from_name(bench.model)
        found.demonstration = demo.run(options.backbone, model, bench.seed)
        print(report.demonstration(found.demonstration), end="\n\n", flush=True)
        runner.run(on_case=save)
        found.is_complete = True
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
    save()
    return found


def _print_cost(bench: Bench) -> None:
    for name in cost.REPORTED:
        if reason := cost.missing(name):
            print(reason)
            continue
        try:
            table = report.cost(cost.TARGETS[name].kind, cost.compute(name, bench))
            print(table, end="\n\n", flush=True)
        except RuntimeError as error:
            print(error)


def _print_comparison(old: Results, found: Results, margin: float) -> bool:
    """Prints what got worse; returns whether anything did."""
    print(f"\nCompared with the run of {old.date}, margin {margin:.0%} of time:")
    if old.machine["device"] != found.machine["device"]:
        print(f"  that was another machine: {old.machine['device']}")
    if old.machine.get("environment", {}) != found.machine.get("environment", {}):
        print(f"  that was another environment: {old.machine.get('environment', {})}")
    rows = found.rows
    if old.loss != found.loss:
        print(f"  that was the gradient of another loss, not compared: {old.loss}")
        rows = [row for row in rows if row.mode != "grad"]
    worse = results.regressions(old.rows, rows, margin)
    print("\n".join(f"  {line}" for line in worse or ["nothing got slower or larger"]))
    return bool(worse)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _read(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.cost:
        _print_cost(options.bench)
        return 0
    if options.found:
        print(report.machine(options.found), end="\n\n")
    found = options.found or _measure(options)
    print(report.tables(found))
    if options.plot and any(row.median_ms for row in found.rows):
        plot.draw(found, options.plot)
    if options.update_readme:
        text = report.markdown(found, options.from_json or options.out)
        report.update_readme(options.update_readme, text)
    if options.old and _print_comparison(options.old, found, options.margin):
        return 1
    return 0 if found.is_complete or options.found else _INTERRUPTED


if __name__ == "__main__":
    status = main()
    if status == _INTERRUPTED:
        # All is written; JAX's runtime, interrupted, crashes when Python takes it down.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
