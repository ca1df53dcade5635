from collections.abc import Iterator

import pytest

from coadvise.ops import attention, convolution, cpu, native


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    """Forgets which native kernels were built in this process, before and after."""
    kept = (cpu.native_kernel, attention._library, convolution._library, native.load, native._warn)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()
