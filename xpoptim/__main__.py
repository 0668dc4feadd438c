"""The command line: ``python -m xpoptim demo`` and ``python -m xpoptim info``; ``xpoptim`` is the same.

Exit status 0 on success, 2 if the command cannot run (one line on stderr says why and what to do), 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import xpoptim


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a bad command line in one line instead of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (help: {self.prog} --help)\n")


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: an int from `minimum` up to `maximum`."""
    allowed = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, not {text!r}") from None
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {value}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="xpoptim", description="Gradient optimizers and Dropout for NumPy and CuPy.")
    parser.add_argument("--version", action="version", version=f"xpoptim {xpoptim.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    about = "train on real handwritten digits, compare the optimizers, save pictures"
    demo = commands.add_parser("demo", help=about, description=about.capitalize() + ".")
    demo.add_argument(
        "--backend",
        choices=("numpy", "cupy"),
        default="numpy",
        help="whose arrays to train with (default: numpy)",
    )
    demo.add_argument(
        "--seed",
        type=whole_number(0, 2**64 - 1),
        default=0,
        metavar="N",
        help="of split, weights, mini-batches and Dropout (default: 0)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("xpoptim-demo"),
        metavar="FOLDER",
        help="where the pictures go (default: xpoptim-demo)",
    )
    demo.add_argument(
        "--steps",
        type=whole_number(1),
        default=600,
        metavar="N",
        help="training steps of each network (default: 600)",
    )

    about = "show versions, engines, devices and threads, and what is missing for each"
    commands.add_parser("info", help=about, description=about.capitalize() + ".")
    return parser


def run_demo(options: argparse.Namespace) -> int:
    from .demo import DemoError, run

    try:
        run(options.backend, options.seed, options.out, options.steps)
    except DemoError as error:
        print(f"xpoptim demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def run_info(options: argparse.Namespace) -> int:
    from .demo import info

    info.show()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process); the exit status."""
    options = make_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output that knows ASCII only gets "?" for "µ", no traceback
    try:
        status = {"demo": run_demo, "info": run_info}[options.command](options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("xpoptim: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        # Standard output takes no more: its disk is full, or its reader has gone (`xpoptim info | head -1`), of which
        # nobody wants to hear. The interpreter will write the rest once more when it ends; let it succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1
        print(f"xpoptim: error: cannot write the output ({error.strerror or error})", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
