"""All that needs a GPU, in one call: ``python benchmarks/gpu.py check``, which is what gpu_check.sh calls.

What is done so that the comparison is fair:

* Everything runs on one stream. Contenders take turns, a block of steps each, in an order that moves on by one each
  round. The median of the blocks is reported; ratios are taken within each round, and their median is reported.
* The GPU is kept busy for half a second before each case, and its clock is recorded before and after it.
* A step's time is that between two events of the GPU around a block, divided by the steps: what the host needs is in
  it wherever the host is the slower one. The host's own time is taken apart, with nothing left for the GPU to do; so
  is the device's, of small cases, from graphs of some steps.
* xpoptim gets other gradient arrays at every step, as backpropagation leaves them. The others keep theirs, which
  spares them work.
* Bandwidth is what the step must move at least (Adam: 28 bytes for each float32 element) over its time, beside that of
  a copy within the GPU (8 bytes an element) in the same rounds. What fits into the L2 cache is faster than memory: such
  rows are labelled, and no bandwidth is given.
* Before it is timed, every contender's first steps are compared with the formula in float64, in each case anew.

Each row is on disk after every round: one JSON file and its tables in Markdown, named after the card and the date.
A contender that raises costs its own row, which holds the error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from gpubench import machine, stages
from gpubench.cases import FIRST_STEPS
from gpubench.record import Record, replace


@contextlib.contextmanager
def device(emulated: bool) -> Iterator[None]:
    """The GPU of this machine, or one that is emulated."""
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  # before CuPy
    if not emulated:
        yield
        return
    from gpubench.emulated import emulated_device

    with emulated_device():
        yield


def probe(path: Path, *, emulated: bool) -> int:
    """Print what is here and what is missing, and describe the machine in a file; 2 if nothing can be measured."""
    found = machine.findings()
    for one in found:
        print(one, flush=True)
    if fatal := [one for one in found if one.missing and one.fatal]:
        print(f"no GPU to run on ({fatal[0].name}: {fatal[0].found}); nothing was measured", file=sys.stderr)
        return 2
    replace(path, json.dumps(machine.describe() | {"emulated": emulated}))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--emulated", action="store_true", help="on the host, at small sizes: see tests/cuda_host")
        return added

    check = command("check", "everything, each stage in a process of its own")
    check.add_argument("out", type=Path, nargs="?", help="folder for the results (default: benchmarks/results)")
    check.add_argument("--seconds", type=float, default=520.0, help="for all, at most (default: 520)")
    check.add_argument("--only", nargs="+", choices=stages.NAMES, default=stages.NAMES, help="these stages")
    command("probe", "what is here").add_argument("file", type=Path, help="JSON file to describe the machine in")
    command("small", "all kernels once on small arrays, for a memory checker")
    command("first", "seconds of a first step").add_argument("rule", choices=FIRST_STEPS)
    command("first-steps", "those in fresh processes").add_argument("record", type=Path)
    bench = command("bench", "the benchmarks that a record lacks")
    bench.add_argument("record", type=Path)
    bench.add_argument("seconds", type=float)
    options = parser.parse_args(argv)
    if options.command == "check" and options.out is None:
        if options.emulated:
            check.error("--emulated needs a folder: what it finds is no result to keep")
        options.out = machine.ROOT / "benchmarks" / "results"
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    sys.path.insert(0, str(machine.ROOT))
    if options.command == "check":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage in work is ended too
        return stages.Check(options.out.resolve(), options.emulated, options.seconds, tuple(options.only)).run()
    if options.command == "first-steps":
        from gpubench import runs

        runs.first_steps(Record.read(options.record), Path(__file__), ["--emulated"] * options.emulated)
        return 0
    with device(options.emulated):
        if options.command == "probe":
            return probe(options.file, emulated=options.emulated)
        from gpubench import measure, runs  # which need NumPy

        if options.command == "small":
            runs.small()
            print("small run: all bits are NumPy's")
        elif options.command == "first":
            print(runs.first_step(options.rule))
        else:
            measure.measure_all(Record.read(options.record), options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
