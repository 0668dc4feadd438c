"""Fixtures and the hypothesis profile of the whole suite."""

import os

import hypothesis

# The same examples on every machine: a failure seen by one is seen by all. `HYPOTHESIS_PROFILE=explore` looks further.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=120)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
