"""Particles on several devices of the host: the bytes of one device."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_run

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.numpyro.sharding import Shards


def on_devices(number, prior="tiny", **env):
    """Return the digests that a process with some devices prints."""
    flags = f"--xla_force_host_platform_device_count={number}"
    done = subprocess.run(
        [sys.executable, sharded_run.__file__, prior],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_give_the_bytes_of_one():
    """Every tensor of the result, to the bit; noise counted on each device gives others."""
    expected = on_devices(1)["run"]
    found = on_devices(8)
    assert {"x0", "log_weights", "log_evidence_steps", "ancestors", "site gain"} <= expected.keys()
    assert found["run"] == expected
    mutant = found["mutant"]
    assert mutant["x0"] != expected["x0"]
    assert mutant["site gain"] != expected["site gain"]
    assert mutant["log_evidence"] != expected["log_evidence"]


@pytest.mark.slow
def test_a_shipped_transformer_gives_the_same_bytes():
    """On meshes of one and of eight, as compiled for users."""
    env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    assert on_devices(8, "yeast-promoter", **env) == on_devices(1, "yeast-promoter", **env)


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_blocks_give_each_particle_its_answer(block):
    """Whatever is left over of the last block."""
    x = jnp.arange(2 * 5 * 3).reshape(2, 5, 3)
    y = x[..., 0] + 0.5
    found = Shards(block=block).each(lambda x, y: {"sum": x.sum(-1) * y}, x, y)
    np.testing.assert_array_equal(found["sum"], x.sum(-1) * y)


def test_a_block_is_never_given_other_rows_than_its_number():
    seen = []

    def asked(x):
        seen.append(x.shape)
        return x.sum(-1)

    for number in (4, 5, 64):
        Shards(block=12).each(asked, jnp.zeros((1, number, 3)))
    assert set(seen) == {(4, 3)}


def test_meshes_that_do_not_fit_are_refused():
    chain, device = sharded_run.tiny_chain(), np.array(jax.devices()[:1])

    def smc(devices, axes):
        return ppn.SMC(
            chain,
            lambda x: 0.0 * x.sum(-1),
            num_particles=15,
            mesh=jax.sharding.Mesh(devices, axes),
        )

    with pytest.raises(ValueError, match="15 particles cannot be shared equally by 8 devices"):
        smc(device.repeat(8), ("particles",))
    with pytest.raises(ValueError, match="mesh must have one axis"):
        smc(device[:, None], ("data", "model"))
