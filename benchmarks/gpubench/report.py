"""What the findings say: shares and ratios, the targets, and the tables."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from .cases import Case

if TYPE_CHECKING:
    from .record import Record, Row

OWN = {
    "Adam": "xpoptim",
    "Adam, clip_norm": "xpoptim, clip_norm",
    "Dropout forward": "xpoptim, forward",
    "Dropout backward": "xpoptim, backward",
}
PEER = {"Adam": "torch fused", "Adam, clip_norm": "torch fused, clip"}
SANITIZER_FOUND = 9  # the exit status for errors found


# --- shares and ratios, within one case


def grouped(rows: list[Row]) -> list[list[Row]]:
    """The rows case by case."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.key, []).append(row)
    return list(groups.values())


def find(rows: list[Row], contender: str) -> Row | None:
    return next((row for row in rows if row.contender == contender and not row.error), None)


def ratio(rows: list[Row], a: str, b: str, *, host: bool = False) -> float | None:
    """How many times as long ``b`` takes as ``a``: the median of the rounds' ratios."""
    one, other = find(rows, a), find(rows, b)
    if one is None or other is None:
        return None
    if host:
        return other.median_host_ms / one.median_host_ms if one.median_host_ms and other.median_host_ms else None
    pairs = list(zip(one.step_ms, other.step_ms, strict=False))  # the last round may have been stopped
    return median(y / x for x, y in pairs) if pairs else None


def of_copy(rows: list[Row], contender: str) -> float | None:
    """The bandwidth as a share of the copy's, where both go to memory."""
    row, copy, times = find(rows, contender), find(rows, "copy"), ratio(rows, contender, "copy")
    if row is None or copy is None or times is None or row.in_l2 or copy.in_l2:
        return None
    return times * row.bytes_per_step / copy.bytes_per_step


def derived(row: Row, group: list[Row]) -> dict[str, Any]:
    """What is written beside a row's own figures."""
    return {
        "median_step_ms": row.median_ms,
        "median_host_ms": row.median_host_ms,
        "median_device_ms": row.median_device_ms,
        "gigabytes_per_second": row.gigabytes_per_second,
        "of_copy": of_copy(group, row.contender),
    }


# --- targets


@dataclass
class Target:
    """A promise, and what became of it."""

    what: str
    verdict: str  # "met", "MISSED" or "not measured"
    measured: str  # or why it was not


def targets(record: Record) -> list[Target]:
    settings = record.settings
    cases = settings.cases()
    groups = {case.key: [row for row in record.rows if row.case.key == case.key] for case in cases}

    def judged(what: str, case: Case, names: tuple[str, str], value: float | None, least: float, unit: str) -> Target:
        what = f"{what}, {case.key}: at least {least:g}{unit}"
        if value is None:
            return Target(what, "not measured", why_not(groups[case.key], names))
        return Target(what, "met" if value >= least else "MISSED", f"{value:.2f}{unit}")

    def share(case: Case, least: float) -> Target:
        own, group = OWN[case.kind], groups[case.key]
        return judged("share of a copy's bandwidth", case, (own, "copy"), of_copy(group, own), least, "")

    def over(peer: str, case: Case, least: float, *, host: bool = False) -> Target:
        own = OWN[case.kind]
        value = ratio(groups[case.key], own, peer, host=host)
        what = f"{peer}'s {'host time' if host else 'time'} over {own}'s"
        return judged(what, case, (own, peer), value, least, " times")

    large = [case for case in cases if (case.tensors, case.elements) == (1, settings.large)]
    adam = [case for case in cases if case.kind == "Adam"]
    thousand = next(case for case in adam if (case.tensors, case.elements) == tuple(settings.thousand))
    found = [
        *(share(case, 0.9) for case in large if case.kind == "Adam"),
        *(share(case, 0.8) for case in large if case.kind.startswith("Dropout")),
        *(over(PEER[case.kind], case, 1.0) for case in cases if case.kind in PEER),
        *(over("CuPy code", case, 5.0) for case in adam),
        over("torch fused", thousand, 2.0, host=True),
        bits(record),
        *(sanitizer(record, tool) for tool in ("memcheck", "racecheck")),
    ]
    return [unmeasured(target) for target in found] if record.machine["emulated"] else found


def unmeasured(target: Target) -> Target:
    """What an emulation says of it."""
    if target.verdict == "not measured":
        return target
    return Target(target.what, "not measured", f"emulated: {target.measured}")


def why_not(rows: list[Row], names: tuple[str, str]) -> str:
    """Why two contenders cannot be compared."""
    found = [row for name in names for row in rows if row.contender == name]
    if len(found) < 2:
        return "the time was up before this case"
    if reasons := [f"{row.contender}: {row.error or row.note}" for row in found if row.error or row.note]:
        return reasons[0]
    if not all(row.step_ms for row in found):
        return "the time was up in this case"
    return f"{next(row.contender for row in found if row.in_l2)}: in L2, not in memory"


def bits(record: Record) -> Target:
    what = "the CPU's bits for every rule and dtype (tests)"
    stage = record.stages.get("tests", {})
    counts = stage.get("bits", {})
    if counts.get("failed"):
        return Target(what, "MISSED", f"{counts['failed']} of {counts['collected']} such tests failed")
    if counts.get("passed") and counts["passed"] == counts["collected"]:
        return Target(what, "met", f"{counts['passed']} such tests passed")
    return Target(what, "not measured", stage.get("outcome", "the tests were not run"))


def sanitizer(record: Record, tool: str) -> Target:
    stage = record.stages.get(tool, {})
    verdict = {0: "met", SANITIZER_FOUND: "MISSED"}.get(stage.get("status"), "not measured")
    return Target(f"{tool} is clean", verdict, stage.get("outcome", "not run"))


# --- tables

HEAD = ("tensors x elements", "contender", "step ms", "device ms", "host ms", "GB/s", "of copy", "times xpoptim")
HEAD = (*HEAD, "peak MB", "SM MHz", "rounds", "note")
TEXT = (1, 11)  # columns that are not numbers


def cells(row: Row, group: list[Row]) -> tuple[str, ...]:
    times = ratio(group, OWN[row.kind], row.contender)
    return (
        f"{row.tensors:,} x {row.elements:,}",
        row.contender,
        number(row.median_ms, 4),
        number(row.median_device_ms, 4),
        number(row.median_host_ms, 3),
        "in L2" if row.in_l2 and row.median_ms else number(row.gigabytes_per_second, 0),
        number(of_copy(group, row.contender), 2),
        number(None if row.contender == "copy" else times, 2),
        number(None if row.peak_bytes is None else row.peak_bytes / 1e6, 1),
        " to ".join(map(str, dict.fromkeys(row.sm_mhz))),
        str(len(row.step_ms) or ""),
        row.error or row.note or (f"device: {row.device_note}" if row.device_note else ""),
    )


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def lines(head: tuple[str, ...], rows: list[tuple[str, ...]], text: tuple[int, ...]) -> list[str]:
    """A Markdown table that is aligned for the eye too."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(3, *(len(row[k]) for row in [head, *rows])) for k in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        pairs = enumerate(zip(row, widths, strict=True))
        return f"| {' | '.join(c.ljust(w) if k in text else c.rjust(w) for k, (c, w) in pairs)} |"

    rule = tuple("-" * w if k in text else "-" * (w - 1) + ":" for k, w in enumerate(widths))
    return [line(head), line(rule), *(line(row) for row in rows)]


def case_table(rows: list[Row]) -> list[str]:
    return lines(HEAD, [cells(row, group) for group in grouped(rows) for row in group], TEXT)


def target_table(record: Record) -> list[str]:
    found = [(target.verdict, target.what, target.measured) for target in targets(record)]
    return lines(("verdict", "target", "measured"), found, (0, 1, 2))


def markdown(record: Record) -> str:
    """Everything for people to read."""
    about = record.machine
    named = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = [
        f"# {about['card']}, {about['date']}",
        "",
        *(["Emulated on the host: times mean nothing.", ""] if about["emulated"] else []),
        f"- driver {about['driver']} (CUDA {about['driver_cuda']}), CUDA runtime {about['runtime_cuda']}, "
        f"NVRTC {about['nvrtc']}, Python {about['python']}, {named}",
        f"- L2 cache {about['l2_bytes'] / 1e6:,.1f} MB, memory {about['memory_bytes'] / 1e9:,.0f} GB, "
        f"{about['multiprocessors']} multiprocessors, compute capability {about['compute_capability']}",
        f"- commit {about['commit']}{', with uncommitted changes' if about['uncommitted_changes'] else ''}; "
        f"`{about['command']}`",
        "",
        "## Targets",
        "",
        *target_table(record),
        "",
        "## Stages",
        "",
        *lines(
            ("stage", "outcome", "seconds"),
            [(name, stage["outcome"], number(stage.get("seconds"), 0)) for name, stage in record.stages.items()],
            (0, 1),
        ),
        "",
        *(f"- failed: `{test}`" for test in record.stages.get("tests", {}).get("failures", [])),
        "",
    ]
    for kind in OWN:
        if rows := [row for row in record.rows if row.kind == kind]:
            text += [f"## {kind}, float32", "", *case_table(rows), ""]
    if record.first_steps:
        found = [(name, number(one["seconds"], 3), one["error"]) for name, one in record.first_steps.items()]
        text += ["## First step in a fresh process", "", *lines(("step", "seconds", "note"), found, (0, 2)), ""]
    return "\n".join(text)
