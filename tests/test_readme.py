"""The README's Python runs as it stands; its CuPy block with NumPy in CuPy's place, since all it needs is the names."""

import re
import sys

import numpy as np
import pytest
import readme_table

BLOCKS = re.findall(r"^```python\n(.*?)^```", readme_table.README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.smoke
def test_the_code_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", np)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) >= 3
    assert np.isfinite(names["params"]["W"]).all()  # type: ignore[index]
