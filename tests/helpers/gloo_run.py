"""What one of two processes does, in a group of ``torch.distributed`` or alone."""

import json
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from digests import digests

from ppl_diffusion import distributed
from ppl_diffusion.inference import SMC, ParticleGibbs
from ppl_diffusion.testing import toy_markov_chain


def log_g(x0):
    return 1.5 * (x0 == 1).sum(-1) - 0.5 * (x0[..., 0] == x0[..., -1])


def fails_in_the_second(x0):
    if torch.distributed.get_rank() == 1:
        raise ValueError("no license for the simulator")
    return log_g(x0)


def assay():
    path = pyro.sample("path", CHAIN)
    gain = pyro.sample("gain", dist.Normal(0.0, 1.0))
    counts = (CHAIN.x0(path) == 1).sum(-1)
    pyro.sample("y", dist.Normal(gain + counts, 0.5), obs=torch.tensor(2.0))


def held():
    counts = (CHAIN.x0(pyro.sample("path", CHAIN)) == 1).sum(-1)
    pyro.sample("y", dist.Normal(counts.double(), 0.5), obs=torch.tensor(2.0))


CHAIN = toy_markov_chain("uniform")


class Counted:
    """A denoiser that counts the rows it sees."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, 0

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def __call__(self, tokens, t):
        self.rows += tokens[..., 0].numel()
        return self.denoiser(tokens, t)


def run(model, potential=None, *, seed=0, **options):
    options = {"num_particles": 12, "num_runs": 2, "ess_threshold": 2.0, **options}
    return told(SMC(model, potential, **options).run(seed=seed))


def gibbs(group=None):
    """Run particle Gibbs, which shares what is asked inside of a context."""
    with distributed.share_rows(group):
        return told(ParticleGibbs(held, num_particles=8, num_samples=3, num_warmup=0).run(seed=0))


def told(posterior):
    """Return everything about a result but how long it took."""
    costs = posterior.num_evaluations, posterior.num_potential_calls
    return {"digests": digests(posterior), "costs": costs, "settings": posterior.settings}


def runs(**options):
    """Return the results of a chain, of a program and of particle Gibbs, and the chain's rows."""
    counted = Counted(CHAIN.kernel.denoiser)
    chain = type(CHAIN)(CHAIN.kernel.with_denoiser(counted), CHAIN.length)
    found = {"chain": run(chain, log_g, **options), "program": run(assay, **options)}
    return {**found, "gibbs": gibbs(options.get("process_group")), "rows": counted.rows}


def first_rows(count, group):
    return slice(0, -(-count // group.size()))


def refusal(*args, **options):
    """Return what a run complains about."""
    try:
        run(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def process(rank, folder):
    """Run all of it as one of two processes, and leave what was found in a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    group = torch.distributed.group.WORLD
    found = runs(process_group=group)
    found["seeded by the first"] = run(CHAIN, log_g, process_group=group, seed=None)
    found["failed"] = refusal(CHAIN, fails_in_the_second, process_group=group)
    found["seeds"] = refusal(CHAIN, log_g, process_group=group, seed=rank)
    found["sizes"] = refusal(CHAIN, log_g, process_group=group, num_particles=12 + rank)
    right, distributed._part = distributed._part, first_rows
    found["mutant"] = run(CHAIN, log_g, process_group=group)
    distributed._part = right
    if rank == 0:
        found["left alone"] = refusal(CHAIN, log_g, process_group=group)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    with suppress(RuntimeError):  # the other one is gone
        torch.distributed.destroy_process_group()
    os._exit(0)
