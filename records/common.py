"""What the tools of this folder share: command line, tables, packages, small models."""

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

# A tool runs as a script, which sees its own folder alone. It imports this module before others.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))

from train_gpt import require

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|nan|inf)"


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows a tool's docstring as its help, and whose errors are one line."""

    def __init__(self, description: str):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=as_written, allow_abbrev=False)

    def error(self, message: str) -> None:
        """Raise ConfigError, where argparse would print its usage and exit."""
        require(False, f"{message} (--help shows examples)")


def optional(module: str) -> ModuleType:
    """Import a module of a package that only tools need. Raises ConfigError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        require(False, f"needs {package}: pip install -r tests/requirements.txt")


def profile(name: str) -> dict[str, str]:
    """Return the environment variables that a profile of run_8xh100.sh sets.

    "cpu" and "smoke" are the small models of this project. Raises ConfigError for an unknown name.
    """
    # The launcher's `default` exports what the environment leaves open; here it prints it instead.
    script = 'source "$1"; default() { echo "$1=$2"; }; set_profile "$2"'
    command = ["bash", "-c", script, "bash", str(ROOT / "run_8xh100.sh"), name]
    done = subprocess.run(command, capture_output=True, text=True)
    require(done.returncode == 0, done.stderr.strip().removeprefix("error: "))
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def markdown_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table, its cells as str() makes them, without padding or a last newline."""
    titles = [*header]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (titles, *rows)]
    lines.insert(1, "|" + "---|" * len(titles))
    return "\n".join(lines)


def last_match(pattern: str, text: str, kind: type = str):
    """Return the first group of the last match in a log, as `kind`; None where nothing matches.

    ^ is the start of any line. The last, since of what a later stage logs again that one counts.
    """
    found = re.findall(pattern, text, re.M)
    return kind(found[-1]) if found else None
