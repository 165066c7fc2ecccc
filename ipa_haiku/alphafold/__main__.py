"""Runs a command-line program with this package's modules in its AlphaFold: see the package."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ipa_haiku.attention.selection import check_name


def main() -> int:
    """Becomes the program, or on Windows runs it and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ipa_haiku.alphafold",
        description="Runs a program that uses AlphaFold 2 with this package's Invariant Point "
        "Attention in it, and in all Python processes that it starts.",
    )
    parser.add_argument("--package", default="alphafold", help="that has AlphaFold's modules")
    parser.add_argument("--implementation", help="of the attention core")
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="a command, or a .py file, and its arguments"
    )
    options = parser.parse_args()
    try:
        check_name(options.implementation)
    except ValueError as error:
        parser.error(str(error))
    if not options.program:
        parser.error("a program is needed.")
    command = options.program
    if command[0].endswith(".py"):
        command = [sys.executable, *command]
    elif shutil.which(command[0]) is None:
        parser.error(f"there is no command {command[0]!r}.")
    hook = str(Path(__file__).parent / "import_hook")
    path = os.pathsep.join(filter(None, [hook, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PYTHONPATH": path,
        "IPA_HAIKU_PACKAGE": options.package,
        "IPA_HAIKU_STARTER": str(os.getpid()),
    }
    if options.implementation is not None:
        environment["IPA_HAIKU_IMPLEMENTATION"] = options.implementation
    if os.name != "nt":  # so that the program gets all signals; on Windows nobody would wait for it
        os.execvpe(command[0], command, environment)
    return subprocess.call(command, env=environment)


if __name__ == "__main__":
    sys.exit(main())
