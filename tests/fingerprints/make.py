"""Fingerprints of the bits that xpoptim computes, to see that a change of the code changes none of them.

``python tests/fingerprints/make.py`` writes ``fingerprints.json`` beside this file: for each rule, dtype and set of
options one digest over three updates and an ``apply`` of arrays in every layout, and one for each of Dropout's dtypes.
The numbers are made of integers, so they are the same everywhere; every NaN counts as the same NaN. Write the file
anew only if results are meant to change, and say so in the changelog. With ``--check`` it compares, and writes nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import (
    DTYPES,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    OPTION_COMBINATIONS,
    RULES,
    make_optimizer,
    option_id,
    special_values,
    words,
)

import xpoptim as xo

FILE = Path(__file__).parent / "fingerprints.json"
SHAPE = (3, 5, 7)
STEPS = 3


def numbers(seed: int, shape: tuple[int, ...], dtype: np.dtype, special: bool) -> np.ndarray:
    """Multiples of 2**-9 between -64 and 64, and among them every special value."""
    parts = 2 if dtype.kind == "c" else 1
    size = int(np.prod(shape)) * parts
    integers = (np.arange(size, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48)
    real = np.empty(0, dtype).real.dtype if parts == 2 else dtype
    values = ((integers.astype(np.int64) - 2**15) / 2.0**9).astype(real)
    if special:
        pool = special_values(dtype)
        values[:: size // len(pool)][: len(pool)] = pool
    return values.view(dtype).reshape(shape)


def layouts() -> Iterator[tuple[str, str]]:
    """Each layout of a parameter with a gradient like it, and each of a gradient beside a plain parameter."""
    yield from ((name, name) for name in LAYOUTS)
    yield from (("C", name) for name in GRADIENT_LAYOUTS if name != "C")


def absorb(digest: Any, array: Any) -> None:
    unsigned, nan = words(array)
    digest.update(np.where(nan, np.array(1, unsigned.dtype), unsigned).tobytes())


def absorb_tree(digest: Any, tree: Any) -> None:
    for _, value in sorted(tree.items()):
        if isinstance(value, dict):
            absorb_tree(digest, value)
        elif isinstance(value, int):
            digest.update(str(value).encode())
        else:
            absorb(digest, value)


def problem(dtype: np.dtype, special: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    params, steps = {}, [{} for _ in range(STEPS)]
    for k, (own, other) in enumerate(layouts()):
        key = f"{k}.{own}.{other}"
        params[key] = LAYOUTS[own](numbers(k, SHAPE, dtype, special))
        for n, grads in enumerate(steps):
            grads[key] = GRADIENT_LAYOUTS[other](numbers(1000 * (n + 1) + k, SHAPE, dtype, special))
    params["scalar"], params["empty"] = numbers(5, (), dtype, False), numbers(5, (0, 3), dtype, False)
    for n, grads in enumerate(steps):
        grads["scalar"], grads["empty"] = numbers(n, (), dtype, False), numbers(n, (0, 3), dtype, False)
    return params, steps


def of_rule(name: str, dtype: str, options: dict[str, Any]) -> str:
    """The digest of one rule, dtype and set of options: mixed layouts together, and plain arrays on the quick path."""
    digest = hashlib.sha256()
    special = options["clip_norm"] is None  # a norm refuses what is not finite
    for plain in (False, True):
        params, steps = problem(DTYPES[dtype], special)
        if plain:
            keep = [key for key in params if key.endswith("C.C")] + ["scalar"]
            params, steps = {k: params[k] for k in keep}, [{k: grads[k] for k in keep} for grads in steps]
        opt = make_optimizer(name, **options)
        for grads in steps:
            opt.update(params, grads)
        absorb_tree(digest, params)
        absorb_tree(digest, opt.state)
        after, state = opt.apply(params, steps[0], opt.state)
        absorb_tree(digest, after)
        absorb_tree(digest, state)
    return digest.hexdigest()[:16]


def of_dropout(dtype: str) -> str:
    digest = hashlib.sha256()
    for own, inverted, ratio in itertools.product(LAYOUTS, (False, True), (0.0, 0.3, 1.0)):
        drop = xo.Dropout(ratio, inverted=inverted, seed=11, layer=3)
        x = LAYOUTS[own](numbers(1, SHAPE, DTYPES[dtype], True))
        for array in (drop.forward(x), drop.backward(x), drop.forward(x, train_flg=False)):
            absorb(digest, array)
        digest.update(np.packbits(drop.mask).tobytes())
    return digest.hexdigest()[:16]


def cases() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Rule, dtype, the options' name, and the options."""
    for name, dtype, options in itertools.product(RULES, DTYPES, OPTION_COMBINATIONS):
        yield name, dtype, option_id(options), options


def main() -> int:
    found: dict[str, Any] = {name: {dtype: {} for dtype in DTYPES} for name in RULES}
    for name, dtype, title, options in cases():
        found[name][dtype][title] = of_rule(name, dtype, options)
    found["Dropout"] = {dtype: of_dropout(dtype) for dtype in DTYPES}
    if "--check" not in sys.argv[1:]:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    stored = json.loads(FILE.read_text())
    wrong = [(name, dtype) for name in stored for dtype in stored[name] if found[name][dtype] != stored[name][dtype]]
    print(f"{len(wrong)} of {sum(map(len, stored.values()))} pairs of rule and dtype differ", *wrong)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
