"""What was found, on disk at any time: one JSON file, and its tables in Markdown."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from . import report
from .cases import Case, Settings


@dataclass
class Row:
    """What was measured of one contender in one case."""

    kind: str
    contender: str
    tensors: int
    elements: int  # of each tensor
    bytes_per_step: float  # that must be moved at least
    in_l2: bool = False  # whether all that a step touches fits into the L2 cache
    step_ms: list[float] = field(default_factory=list)  # one for each round
    host_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)  # of a step in a graph of some, with nothing between them
    device_note: str = ""  # why there are none
    peak_bytes: int | None = None  # that a step takes for a while, beyond parameters, gradients and state
    sm_mhz: list[int | str] = field(default_factory=list)  # the card's clock before and after the rounds
    error: str = ""  # what it raised; its times are not used then
    note: str = ""  # why it was not measured

    @property
    def case(self) -> Case:
        return Case(self.kind, self.tensors, self.elements, ())

    @property
    def median_ms(self) -> float | None:
        return median(self.step_ms) if self.step_ms and not self.error else None

    @property
    def median_host_ms(self) -> float | None:
        return median(self.host_ms) if self.host_ms and not self.error else None

    @property
    def median_device_ms(self) -> float | None:
        return median(self.device_ms) if self.device_ms and not self.error else None

    @property
    def gigabytes_per_second(self) -> float | None:
        return self.bytes_per_step / self.median_ms / 1e6 if self.median_ms and not self.in_l2 else None

    @classmethod
    def read(cls, content: dict[str, Any]) -> Row:
        return cls(**{one.name: content[one.name] for one in fields(cls)})


class Record:
    """The findings of one check. `save` after each of them: a file is replaced as a whole, so it is never in pieces."""

    def __init__(self, path: Path, machine: dict[str, Any], settings: Settings) -> None:
        self.path = path
        self.machine, self.settings = machine, settings
        self.stages: dict[str, dict[str, Any]] = {}
        self.rows: list[Row] = []
        self.first_steps: dict[str, dict[str, Any]] = {}
        self.done: list[str] = []  # cases
        self.in_work = ["", ""]  # case and contender: who is to blame if the process ends

    @classmethod
    def read(cls, path: Path) -> Record:
        content = json.loads(path.read_text())
        record = cls(path, content["machine"], Settings(**content["settings"]))
        record.stages, record.first_steps = content["stages"], content["first_steps"]
        record.done, record.in_work = content["done"], content["in_work"]
        record.rows = [Row.read(row) for row in content["rows"]]
        return record

    def rows_of(self, case: Case) -> list[Row]:
        """The case's rows, made if there are none."""
        if found := [row for row in self.rows if row.case.key == case.key]:
            return found
        made = [Row(case.kind, name, case.tensors, case.elements, 0.0) for name in case.contenders]
        self.rows += made
        return made

    def content(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "settings": asdict(self.settings),
            "targets": [asdict(target) for target in report.targets(self)],
            "stages": self.stages,
            "first_steps": self.first_steps,
            "rows": [asdict(row) | report.derived(row, group) for group in report.grouped(self.rows) for row in group],
            "done": self.done,
            "in_work": self.in_work,
        }

    def save(self) -> None:
        replace(self.path, json.dumps(self.content(), indent=1) + "\n")
        replace(self.path.with_suffix(".md"), report.markdown(self))


def replace(path: Path, text: str) -> None:
    """Write a file so that anyone sees either the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def stem(machine: dict[str, Any]) -> str:
    """A name for the files, of the card and the date."""
    card = re.sub("[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    return f"gpu-{card}-{machine['date'][:10]}"
