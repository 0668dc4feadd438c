"""The bits that are computed are those of the stored fingerprints; `fingerprints/make.py --check` compares them all."""

import json
from typing import Any

import pytest
from fingerprints import make
from helpers import DTYPES

STORED = json.loads(make.FILE.read_text())
# Of the options' sets: none, and all with a global norm.
TITLES = ("plain", "weight_decay+decoupled+clip_value+clip_norm+maximize")
CASES = [case for case in make.cases() if case[2] in TITLES]


@pytest.mark.parametrize(("name", "dtype", "title", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_rules(name: str, dtype: str, title: str, options: dict[str, Any]) -> None:
    assert make.of_rule(name, dtype, options) == STORED[name][dtype][title]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: str) -> None:
    assert make.of_dropout(dtype) == STORED["Dropout"][dtype]
