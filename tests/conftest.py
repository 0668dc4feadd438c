"""Fixtures and the hypothesis profile of the whole suite."""

import os

import hypothesis

import xpoptim
from xpoptim.engines.cpu import native

# Also in the processes that tests start, the package is the installed one: not what lies in the current folder.
os.environ["PYTHONSAFEPATH"] = "1"


# The same examples on every machine: a failure seen by one is seen by all. `HYPOTHESIS_PROFILE=explore` looks further.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=120)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_report_header() -> str:
    extension = f"without its extension: {native.missing()}" if native.missing() else "with its extension"
    return f"xpoptim {xpoptim.__version__} from {os.path.dirname(xpoptim.__file__)}, {extension}"
