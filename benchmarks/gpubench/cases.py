"""What is measured: cases, sizes and times, in full and small enough for an emulated device."""

from __future__ import annotations

from dataclasses import dataclass

ADAM = ("xpoptim", "torch fused", "torch foreach", "CuPy kernel", "CuPy code", "copy")
GRAPHS = ("xpoptim, graph", "torch fused, graph")
CLIPPED = ("xpoptim, clip_norm", "torch fused, clip", "copy")
FORWARD = ("xpoptim, forward", "torch, forward", "CuPy code, forward", "copy")
BACKWARD = ("xpoptim, backward", "torch, backward", "CuPy code, backward", "copy")
FIRST_STEPS = ("Adam", "clip_norm")


@dataclass(frozen=True)
class Case:
    """One size of one kind of step, and who takes it."""

    kind: str  # "Adam", "Adam, clip_norm", "Dropout forward" or "Dropout backward"
    tensors: int
    elements: int  # of each tensor
    contenders: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.tensors * self.elements

    @property
    def key(self) -> str:
        return f"{self.kind}, {self.tensors:,} x {self.elements:,}"


@dataclass(frozen=True)
class Settings:
    """Sizes and times."""

    one: tuple[int, ...]  # elements of one tensor
    many: tuple[tuple[int, int], ...]  # tensors, and elements of each
    dropout: tuple[int, ...]
    large: int  # elements: where bandwidth is judged
    thousand: tuple[int, int]  # tensors and elements: where the host's time is judged
    small: int  # elements in all up to which a graph of some steps is timed
    warm_up: float  # seconds, before each case
    block: float  # seconds that a block of steps should take
    fewest_rounds: int = 3
    most_rounds: int = 15
    graph_steps: int = 10

    def cases(self) -> list[Case]:
        """What matters most comes first, in case time runs out."""
        tensors, elements = self.thousand
        judged = [
            Case("Adam", 1, self.large, ADAM),
            Case("Adam", tensors, elements, (*ADAM, *GRAPHS)),
            Case("Dropout forward", 1, self.large, FORWARD),
            Case("Dropout backward", 1, self.large, BACKWARD),
        ]
        others = [
            *(Case("Adam", 1, n, (*ADAM, *GRAPHS) if n <= self.small else ADAM) for n in self.one),
            *(Case("Adam", *size, (*ADAM, *GRAPHS)) for size in self.many),
            *(Case("Adam, clip_norm", *size, CLIPPED) for size in ((1, self.large), self.thousand)),
            *(Case("Dropout forward", 1, n, FORWARD) for n in self.dropout),
            *(Case("Dropout backward", 1, n, BACKWARD) for n in self.dropout),
        ]
        return list(dict.fromkeys([*judged, *others]))


FULL = Settings(
    one=(1_000_000, 4_000_000, 16_000_000, 100_000_000, 500_000_000),
    many=((1, 1_000), (100, 1_000), (1_000, 1_000), (10_000, 1_000), (1_000, 100_000)),
    dropout=(1_000_000, 16_000_000, 100_000_000),
    large=100_000_000,
    thousand=(1_000, 1_000),
    small=20_000_000,
    warm_up=0.5,
    block=0.03,
)

# Some are larger than the 4 KB of L2 cache that the emulated device says to have, some are not.
EMULATED = Settings(
    one=(100, 600),
    many=((1, 40), (12, 30)),
    dropout=(60,),
    large=600,
    thousand=(12, 30),
    small=500,
    warm_up=0.001,
    block=0.0001,
    most_rounds=3,
    graph_steps=2,
)
