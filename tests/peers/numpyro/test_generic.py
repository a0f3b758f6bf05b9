"""NumPyro's own generic distribution tests on our classes.

They come with its source distribution, which pip fetches once; set ``NUMPYRO_SOURCE`` to a checkout
where there is no package index. Without either these tests are skipped, and say so.
"""

import importlib.util
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions.batch_util import vmap_over

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.processes import Absorbing, Uniform

SIZE, LENGTH = 3, 2
PROCESS = Absorbing(SIZE)


class Chain(ppn.ReverseChain):
    """A chain whose length is known: what is passed through ``jit`` are arrays."""

    def __init__(self, kernel, prompt):
        super().__init__(kernel, LENGTH, prompt)


class Step(ppn.TokenStep):
    """A step of one process."""

    def __init__(self, tokens, log_probs, alpha_t, alpha_s):
        super().__init__(PROCESS, tokens, log_probs, alpha_t, alpha_s)


def kernel(process):
    joint = np.random.default_rng(0).dirichlet(np.ones(SIZE**LENGTH)).reshape((SIZE,) * LENGTH)
    return ppn.InterpolatingKernel(process, TableDenoiser(jnp.asarray(joint), process), num_steps=2)


TABLE = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(1).normal(size=(LENGTH, SIZE))))
CASES = {
    "absorbing": (Chain, (kernel(Absorbing(SIZE)), jnp.array([-1, -1]))),
    "uniform": (Chain, (kernel(Uniform(SIZE)), jnp.array([-1, -1]))),
    "prompts": (Chain, (kernel(Uniform(SIZE)), jnp.array([[-1, 1], [2, -1]]))),
    "step": (Step, (jnp.array([3, 1]), TABLE, jnp.array(0.2), jnp.array(0.7))),
    "steps": (Step, (jnp.array([[3, 1], [3, 3]]), TABLE, jnp.array(0.2), jnp.array(0.7))),
}
PREPENDED = [(), (2,), (2, 3)]


@pytest.fixture(scope="session")
def upstream(tmp_path_factory):
    """Return NumPyro's module of distribution tests."""
    folder = os.environ.get("NUMPYRO_SOURCE") or _fetched(tmp_path_factory.mktemp("numpyro"))
    file = Path(folder) / "test" / "test_distributions.py"
    assert file.is_file(), f"NUMPYRO_SOURCE={folder} holds no test/test_distributions.py"
    spec = importlib.util.spec_from_file_location("numpyro_generic", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fetched(folder):
    name = f"numpyro-{version('numpyro')}"
    wanted = [name.replace("-", "=="), "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    call = [sys.executable, "-m", "pip", "download", "--quiet", *wanted]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    archive = folder / f"{name}.tar.gz"
    if done.returncode or not archive.is_file():
        pytest.skip(f"the source distribution {name} could not be fetched; set NUMPYRO_SOURCE")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / name


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("prepended", PREPENDED, ids=str)
def test_shapes(upstream, case, prepended):
    upstream.test_dist_shape(case[0], None, case[1], prepended)


@pytest.mark.parametrize("name", ["has_rsample", "args_attributes", "jit_log_likelihood"])
def test_once(upstream, case, name):
    getattr(upstream, f"test_{name}")(case[0], None, case[1])


@pytest.mark.parametrize("name", ["independent_shape", "dist_pytree", "vmap_dist"])
def test_structure(upstream, case, name):
    getattr(upstream, f"test_{name}")(case[0], None, case[1])


@pytest.mark.parametrize("prepended", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("sampled", [(), (4,)], ids=str)
def test_expansion(upstream, case, prepended, sampled):
    upstream.test_expand(case[0], None, case[1], prepended, sampled)


def test_vmap_over_knows_the_fields(case):
    """The upstream test passes over classes that do not say what can be mapped over."""
    d = case[0](*case[1])
    axes = vmap_over(d, **({"prompt": 0} if case[0] is Chain else {"tokens": 0}))
    assert (axes.prompt if case[0] is Chain else axes.tokens) == 0
