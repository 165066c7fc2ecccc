"""Runs a command-line program with this package's modules in its AlphaFold: see the package."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ipa_haiku.attention.selection import select_implementation


def main() -> int:
    """Runs a program with the modules of this package in its AlphaFold; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ipa_haiku.alphafold",
        description="Runs a program that uses AlphaFold 2 with this package's Invariant Point "
        "Attention in it, and in all Python processes that it starts.",
    )
    parser.add_argument("--package", default="alphafold", help="that has AlphaFold's modules")
    parser.add_argument("--implementation", help="of the attention core")
    parser.add_argument("program", help="a command, or a .py file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    options = parser.parse_args()
    try:
        select_implementation((1, 1, 1), implementation=options.implementation)
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    command = [options.program]
    if options.program.endswith(".py"):
        command = [sys.executable, options.program]
    elif shutil.which(options.program) is None:
        parser.error(f"there is no command {options.program!r}.")
    hook = str(Path(__file__).parent / "import_hook")
    path = os.pathsep.join(filter(None, [hook, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "IPA_HAIKU_PACKAGE": options.package}
    if options.implementation is not None:
        environment["IPA_HAIKU_IMPLEMENTATION"] = options.implementation
    process = subprocess.Popen([*command, *options.arguments], env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the program has it, too, and ends as it likes
            pass


if __name__ == "__main__":
    sys.exit(main())
