"""One step over the leaves of a container: every check, then every write."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.leaves import Leaf, replaced, resolve_gradient, resolve_parameter
from ..arrays.memory import Written, beside, copied, dense_alike, extent, overlapping_pair, overlaps_itself
from ..engines import reference
from ..engines.choose import selected
from ..recipe.recipe import Recipe, Traced
from ..trace.sums import add_in_order
from .ready import Ready, ready


def check(leaves: list[Leaf], *, writing: bool) -> None:
    """Resolve every leaf; if the step must leave the parameters alone, put copies in their place."""
    for leaf in leaves:
        resolve_parameter(leaf, writing=writing)
        resolve_gradient(leaf)
        if not writing and not replaced(leaf):
            leaf.p = copied(leaf.p)


def check_memory(leaves: list[Leaf], known: Any) -> Any:
    """Refuse parameters that share memory; what was found good is returned, to be ``known`` the next time."""
    memory = [(leaf.named("params"), extent(leaf.p)) for leaf in leaves if leaf.mutable]
    memory += [(f"a slot of {x.named('params')}", extent(slot)) for x in leaves if x.mutable for slot in x.slots]
    written = [(name, a) for name, a in memory if a is not None]
    key = tuple((a.ctypes.data, a.shape, a.strides) for _, a in written)
    if key == known:
        return known
    _refuse_identical(leaves)
    for leaf in leaves:
        place = extent(leaf.p) if leaf.mutable else None
        if place is not None and not place.flags.writeable:
            raise ValueError(f"{leaf.named('params')} is read-only: pass a writable copy, or use apply")
        if leaf.mutable and overlaps_itself(leaf.p):
            raise ValueError(
                f"{leaf.named('params')} has elements that share their memory (as after expanding): pass a copy"
            )
    pair = overlapping_pair(written)
    if pair:
        raise ValueError(
            f"{pair[0]} and {pair[1]} share memory: pass one of them, or copies "
            "(an update of the one would change the other)"
        )
    return key


def copy_overlapping_gradients(leaves: list[Leaf]) -> None:
    """A gradient that lies in memory to be written acts as if it had been copied first: so it is."""
    arrays = [extent(a) for leaf in leaves if leaf.mutable for a in (leaf.p, *leaf.slots)]
    memory = Written([a for a in arrays if a is not None])
    for leaf in leaves:
        place = extent(leaf.g) if leaf.g is not None else None
        if place is not None and memory.touches(place):
            leaf.g = copied(leaf.g)


class Step:
    """A recipe over checked leaves. Making one may raise and writes nothing; `run` writes.

    ``counter`` is the optimizer's step count on a GPU, if it has one already, and ``count`` the host's; None keeps the
    count on the host. Then a global norm is fetched from the GPU, which waits for it.
    """

    def __init__(
        self,
        traced: Traced,
        leaves: list[Leaf],
        values: list[float],
        *,
        count: int | None = None,
        counter: Any = None,
        capturable: bool = False,
    ) -> None:
        recipe = traced.recipe
        self.traced, self.recipe, self.leaves, self.values = traced, recipe, leaves, values
        self.cpu, self.gpu, self.others, self.staged = _divided(recipe, leaves)
        self.cpu_plan, self.gpu_plan = self._plans()
        counted = recipe.reductions or capturable
        alone = self.gpu_plan is not None and len(self.gpu_plan.devices) == 1 and not self.others and not self.cpu
        self.counter = self._counter(counter, count) if count is not None and counted and alone else None
        if recipe.reductions and self.counter is None:
            self.values = [*values, self._norm()]
        # A rule that was not traced may raise for any leaf: it must have run for all of them before the first write.
        self._results = None if recipe.fused else [self._computed(leaf) for leaf in self.others]

    def _computed(self, leaf: Leaf) -> list[Any]:
        with beside(leaf.p):
            return reference.computed(self.traced, leaf, self.values)

    def _plans(self) -> tuple[Any, Any]:
        cpu_plan = gpu_plan = None
        if self.cpu:
            from ..engines.cpu.plan import Plan

            cpu_plan = Plan(self.traced, self.cpu)
        if self.gpu:
            from ..engines.cuda import plan as cuda

            gpu_plan = cuda.Plan(self.traced, self.gpu)
        return cpu_plan, gpu_plan

    def _counter(self, counter: Any, count: int) -> Any:
        from ..engines.cuda.plan import Counter

        self.gpu_plan.prepare()
        device = self.gpu_plan.devices[0]
        if counter is None or counter.device != device:
            return Counter(device, count)
        if counter.expected != count:
            counter.write(count)
        return counter

    def _norm(self) -> float:
        sums: dict[str, float] = {}
        if self.cpu_plan is not None:
            odd = {i: x.g for i, x in enumerate(self.cpu) if x.g is not None and not x.g.flags.c_contiguous}
            squares = self.cpu_plan.squares(self.values, odd)
            sums |= dict(zip((x.key for x in self.cpu), squares.tolist(), strict=True))
        if self.gpu_plan is not None:
            sums |= {self.gpu[i].key: value for i, value in self.gpu_plan.squares(self.values).items()}
        for leaf in self.others:
            with beside(leaf.p):
                sums[leaf.key] = reference.squares_sum(self.traced, leaf, self.values)
        return finite_norm({leaf.key: leaf.named("grads") for leaf in self.leaves}, sums)

    def run(self, made: Any) -> None:
        """Write parameters and slots; immutable leaves get new arrays instead. ``made``, a ``c_int64``, becomes 1."""
        try:
            if self.cpu_plan is not None:
                self.cpu_plan.run(self.values, made)
        finally:  # also if a signal handler raised right after the kernels
            if made.value:
                self._unstage("numpy")
        made.value = 1
        if self.counter is not None:
            self.gpu_plan.run_on_device(self.values, self.counter, from_state=False)
            self.counter.expected += 1
        elif self.gpu_plan is not None:
            self.gpu_plan.run(self.values)
        self._unstage("cupy")
        for i, leaf in enumerate(self.others):
            results = self._computed(leaf) if self._results is None else self._results[i]
            with beside(leaf.p):
                reference.write(leaf, results)

    def _unstage(self, space: str) -> None:
        for leaf, copy in self.staged:
            if leaf.space == space:
                _bring_home(leaf, copy)

    def ready(self, params: Any, slots: dict[str, dict[str, Any]]) -> Ready | None:
        """What the next step can start from, if one engine served every leaf; else None."""
        if not self.leaves or any(not _gradient_alone(leaf, copy) for leaf, copy in self.staged):
            return None
        if len(self.cpu) == len(self.leaves):
            return ready(self.recipe, self.cpu_plan, self.cpu, params, [leaf.g for leaf in self.leaves], slots)
        # Without a counter a norm over GPUs takes the host, which only a full step does.
        if len(self.gpu) == len(self.leaves) and (self.counter is not None or not self.recipe.reductions):
            return ready(self.recipe, self.gpu_plan, self.gpu, params, [leaf.g for leaf in self.leaves], slots)
        return None


def _bring_home(leaf: Leaf, copy: Leaf) -> None:
    """What was computed in dense copies, into the arrays that they stand for."""
    from ..engines import blocks

    for old, new in zip((leaf.p, *leaf.slots), (copy.p, *copy.slots), strict=True):
        if new is not old:
            blocks.copy(old, new)


def _gradient_alone(leaf: Leaf, copy: Leaf) -> bool:
    """Whether a NumPy leaf is served through a copy of nothing but a gradient that is dense in its own way."""
    kept = all(new is old for new, old in zip((copy.p, *copy.slots), (leaf.p, *leaf.slots), strict=True))
    return leaf.space == "numpy" and kept and copy.g.dtype == leaf.g.dtype and dense_alike([leaf.g])


Divided = tuple[list[Leaf], list[Leaf], list[Leaf], list[tuple[Leaf, Leaf]]]


def _divided(recipe: Recipe, leaves: list[Leaf]) -> Divided:
    """The leaves for the CPU's kernels, the GPU's, and the reference engine; and those served as copies."""
    engine = selected()
    cpu: list[Leaf] = []
    gpu: list[Leaf] = []
    others: list[Leaf] = []
    staged: list[tuple[Leaf, Leaf]] = []
    for leaf in leaves:
        reason = _obstacle(recipe, leaf)
        if reason and engine == "fused" and leaf.g is not None:
            place = leaf.named("params")
            raise ValueError(f'{place} cannot take the fused path: {reason} (xo.engine("auto") allows it)')
        fused = cpu if leaf.space == "numpy" else gpu
        if engine == "reference" or (reason and not _stageable(recipe, leaf)):
            if leaf.g is not None:
                others.append(leaf)
        elif not reason:
            fused.append(leaf)
        elif leaf.g is not None:
            staged.append((leaf, _engine(leaf).staged(leaf)))
            fused.append(staged[-1][1])
    return cpu, gpu, others, staged


def _engine(leaf: Leaf) -> Any:
    """The fused engine for a leaf's arrays, or None."""
    if leaf.space == "numpy":
        from ..engines.cpu import plan as cpu

        return cpu
    if leaf.space == "cupy":
        from ..engines.cuda import plan as cuda

        return cuda
    return None


def _stageable(recipe: Recipe, leaf: Leaf) -> bool:
    """Whether a leaf with an obstacle gets a kernel through dense copies."""
    engine = _engine(leaf)
    return recipe.fused and engine is not None and engine.stageable(leaf)


def _obstacle(recipe: Recipe, leaf: Leaf) -> str:
    if not recipe.fused:
        return f"{recipe.name} says fused = False: it is plain Array API code"
    engine = _engine(leaf)
    return engine.obstacle(leaf) if engine is not None else f"there is no fused engine for {leaf.space} arrays"


def engine_for(recipe: Recipe, leaf: Leaf, with_gradient: bool) -> tuple[str, str]:
    """Which engine serves a leaf, and why."""
    if with_gradient and leaf.g is None:
        return "none", "its gradient is None: left as it is"
    if selected() == "reference":
        return "reference", 'chosen by xo.engine("reference") or XPOPTIM_ENGINE'
    reason = _obstacle(recipe, leaf)
    if reason:
        return ("staged", f"{reason}: through dense copies") if _stageable(recipe, leaf) else ("reference", reason)
    if replaced(leaf):
        kind = "a NumPy scalar" if isinstance(leaf.given, np.generic) else "a Python float"
        return "fused", f"{kind}, through an array of its own; replaced in its container"
    return "fused", f"dense {'CuPy' if leaf.space == 'cupy' else 'NumPy'} arrays of equal layout"


def _refuse_identical(leaves: list[Leaf]) -> None:
    """One mutable array under two keys, also where the library does not tell where its memory lies."""
    seen: dict[int, str] = {}
    for leaf in leaves:
        if leaf.mutable and not replaced(leaf):
            if id(leaf.given) in seen and leaf.given.shape != () and 0 not in leaf.given.shape:
                first, second = seen[id(leaf.given)], leaf.named("params")
                raise ValueError(f"{first} and {second} are the same array: they share memory; pass it once")
            seen[id(leaf.given)] = leaf.named("params")


def finite_norm(names: dict[str, str], sums: dict[str, float]) -> float:
    """The global norm from each leaf's sum of squares; an error that names the first bad leaf if it is not finite.

    ``names`` maps the leaves' keys, in their order, to how errors spell their gradients.
    """
    total = add_in_order([sums[key] for key in sorted(sums)])
    if not np.isfinite(total):
        bad = next((name for key, name in names.items() if not np.isfinite(sums.get(key, 0.0))), None)
        place = f"{bad} holds inf or NaN, or values too large to square" if bad else "the sum over the arrays overflows"
        raise FloatingPointError(f"the norm of the gradients is {np.sqrt(total)}: {place}; nothing was changed")
    return float(np.sqrt(total))
