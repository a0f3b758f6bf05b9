"""Seeds, and readable failures of the shipped contracts."""

import gc
import os
import signal

import pyro
import pytest
import torch
from pyro.poutine import runtime

# JAX is asked for numbers on small arrays, each compiled once and used once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

pytest.register_assert_rewrite("ppl_diffusion.testing")


# A suite that a script starts in the background is deaf to Ctrl-C, and so is all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    # What was imported stays: a collector that walks it again and again is a tenth of the suite.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(20260101)
    yield
    left, runtime._PYRO_STACK[:] = list(runtime._PYRO_STACK), []
    assert not left, f"the test left handlers on Pyro's stack: {left}"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260101)
