"""The tests of the CUDA engine, which run emulated elsewhere, on a GPU: the same bits as NumPy's."""

from collections.abc import Iterator

import pytest
from cuda_host.steps import GPU
from real_gpu import real_gpu, skip_without_gpu
from test_cuda_engine import *  # noqa: F403  # each test once more, with the fixture below
from test_cuda_streams import *  # noqa: F403

skip_without_gpu()


@pytest.fixture  # type: ignore[no-redef]
def gpu() -> Iterator[GPU]:
    with real_gpu() as real:
        yield real
