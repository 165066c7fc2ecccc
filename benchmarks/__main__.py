"""`python -m benchmarks`: see `--help`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks import cases, cost, demo, machine, plot, report, results, structure
from benchmarks.cases import Bench, Model
from benchmarks.peers import Checkouts
from benchmarks.results import Results
from benchmarks.runner import Runner
from benchmarks.structure import Backbone

_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers separated by commas, got {text!r}."
        ) from None


def _margin(text: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = -1.0
    if not 0 <= margin < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}.")
    return margin


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m benchmarks",
        description="Demonstrates Invariant Point Attention on a real protein, then measures time, "
        "memory and error of this project's implementations and of other people's.",
        epilog="Lists are separated by commas. Exit status: 0; 1 if --compare found something; 2 "
        "for a wrong option; 130 after Ctrl-C, which keeps what was measured.",
    )
    add = parser.add_argument
    sweep = parser.add_argument_group("what to measure (each overrides the configuration file)")
    sweep.add_argument(
        "--config", metavar="FILE", default=str(cases.CONFIGS / "bench_quick.toml"),
        help="the sweep; configs/bench_*.toml, bench_quick.toml unless given",
    )  # fmt: skip
    sweep.add_argument("--model", metavar="NAME", help="sizes: configs/NAME.toml")
    sweep.add_argument("--sizes", metavar="N,...", type=_sizes, help="numbers of residues")
    sweep.add_argument(
        "--implementations", metavar="NAME,...", type=_names,
        help=f"of this project: {', '.join(cases.IMPLEMENTATIONS)}; or none",
    )  # fmt: skip
    sweep.add_argument(
        "--peers", metavar="NAME,...", type=_names,
        help=f"other people's: {', '.join(cases.PEERS)}; or none",
    )  # fmt: skip
    sweep.add_argument(
        "--openfold", metavar="PATH", help="a checkout of OpenFold; adds the peer openfold"
    )
    sweep.add_argument(
        "--flash-ipa", metavar="PATH", help="a checkout of FlashIPA; adds the peer flash_ipa"
    )
    sweep.add_argument("--modes", metavar="MODE,...", type=_names, help="forward, grad")
    sweep.add_argument(
        "--what", metavar="PART,...", type=_names,
        help="core: the attention function; module: the Haiku module; structure_module: "
        "AlphaFold 2's structure module with the Haiku module in it",
    )  # fmt: skip
    sweep.add_argument(
        "--dtype", metavar="TYPE", help="of activations and weights: float32, bfloat16"
    )
    sweep.add_argument(
        "--pair-rank", metavar="R", type=int,
        help="give inputs_2d as factors of rank R; 0: as an array",
    )  # fmt: skip
    sweep.add_argument("--repeats", metavar="R", type=int, help="timed samples of each row")
    sweep.add_argument("--seed", metavar="S", type=int, help="of inputs and weights")
    add(
        "--structure", metavar="FILE",
        help="demonstrate on this PDB or mmCIF file instead of the protein shipped",
    )  # fmt: skip
    add("--chain", metavar="NAME", default="A", help="its chain (default: A)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--cost", action="store_true",
        help="measure nothing: compile the modules for an NVIDIA H200 and a TPU v5e, which need "
        "not be there, and print what the programs would need",
    )  # fmt: skip
    add("--out", metavar="FILE", help="write the results as JSON, after each group of rows")
    add("--plot", metavar="FILE", help="draw time and memory against N (.png, .pdf, .svg)")
    add("--compare", metavar="OLD", help="say what got slower or larger than in this JSON file")
    add(
        "--margin", metavar="F", type=_margin, default=0.1,
        help="fraction by which a median must grow, with quartiles apart, to count as slower "
        "(default: 0.1)",
    )  # fmt: skip
    add(
        "--update-readme", metavar="FILE", nargs="?", const="README.md",
        help="put the table between the benchmark markers of a Markdown file (README.md)",
    )  # fmt: skip
    source.add_argument(
        "--from-json", metavar="FILE",
        help="measure nothing: take the results of an earlier --out",
    )  # fmt: skip
    return parser


def _bench(options: argparse.Namespace) -> Bench:
    names = ("model", "sizes", "implementations", "peers", "modes", "what", "dtype", "repeats")
    overrides: dict[str, Any] = {
        name: getattr(options, name)
        for name in (*names, "pair_rank", "seed")
        if getattr(options, name) is not None
    }
    bench = Bench.from_toml(options.config, **overrides)
    added = [name for name in ("openfold", "flash_ipa") if getattr(options, name) is not None]
    peers = dict.fromkeys((*bench.peers, *added))
    return Bench.from_toml(options.config, **overrides | {"peers": tuple(peers)})


class _Plan(NamedTuple):
    """What is to be done, checked before anything is measured.

    Attributes:
      bench: the sweep.
      checkouts: of peers.
      backbone: of the protein for the demonstration.
      found: results of an earlier run, to take instead of measuring.
      old: results to compare with.
    """

    bench: Bench
    checkouts: Checkouts
    backbone: Backbone
    found: Results | None
    old: Results | None


def _plan(options: argparse.Namespace) -> _Plan:
    """Reads and checks what the options name.

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
    checkouts = Checkouts(options.openfold, options.flash_ipa)
    checkouts.check()
    return _Plan(
        bench=_bench(options),
        checkouts=checkouts,
        backbone=(
            structure.read_structure(options.structure, options.chain)
            if options.structure
            else structure.read_shipped()
        ),
        found=results.read(options.from_json) if options.from_json else None,
        old=results.read(options.compare) if options.compare else None,
    )


def _measure(plan: _Plan, out: str | None) -> Results:
    """Demonstrates and measures, printing as it goes; Ctrl-C ends it with what there is."""
    bench = plan.bench
    runner = Runner(bench, machine.describe(bench.dtype), plan.checkouts)
    found = runner.results

    def save() -> None:
        if out:
            found.write(out)

    print(report.machine(found), end="\n\n", flush=True)
    try:
        found.demonstration = demo.run(plan.backbone, Model.from_name(bench.model), bench.seed)
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
            print(
                report.cost(cost.TARGETS[name].label, cost.compute(name, bench)),
                end="\n\n",
                flush=True,
            )
        except RuntimeError as error:
            print(error)


def _print_comparison(old: Results, found: Results, margin: float) -> bool:
    """Prints what got worse; returns whether anything did."""
    worse = results.regressions(old.rows, found.rows, margin)
    print(f"\nCompared with the run of {old.date}, margin {margin:.0%} of time:")
    if old.machine["device"] != found.machine["device"]:
        print(f"  that was another machine: {old.machine['device']}")
    if old.machine.get("environment", {}) != found.machine.get("environment", {}):
        print(f"  that was another environment: {old.machine.get('environment', {})}")
    print("\n".join(f"  {line}" for line in worse or ["nothing got slower or larger"]))
    return bool(worse)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        plan = _plan(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.cost:
        _print_cost(plan.bench)
        return 0
    if plan.found:
        print(report.machine(plan.found), end="\n\n")
    found = plan.found or _measure(plan, options.out)
    print(report.tables(found))
    if options.plot and any(row.median_ms for row in found.rows):
        plot.draw(found, options.plot)
    if options.update_readme:
        report.update_readme(
            options.update_readme, report.markdown(found, options.from_json or options.out)
        )
    if plan.old and _print_comparison(plan.old, found, options.margin):
        return 1
    return 0 if found.is_complete or plan.found else _INTERRUPTED


if __name__ == "__main__":
    status = main()
    if status == _INTERRUPTED:
        # All is written; JAX's runtime, interrupted, crashes when Python takes it down.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
