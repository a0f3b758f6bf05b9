"""Whether a program reads more of a path than its clean sequence.

Most programs of this package hand a Pyro program clean sequences, each repeated as if it were a
whole path: only the clean sequence is there while a chain is unfinished. A program that reads the
states in between means another posterior, and would get a wrong one in silence. So it is tried: the
same sequences with the same latents, once repeated and once behind other earlier states.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion.inference._program import Program, ProgramRun
from ppl_diffusion.inference._sites import NUM_TRIALS, ChainSite


def require_sequences_only(program: Program) -> frozenset[str]:
    """Refuse a program whose density reads the states before the clean sequence.

    A dependence that shows for few sequences only may be missed.

    :param program: the program with its arguments.
    :returns: deterministic sites that read them, whose values need the path.
    :raises CapabilityError: if the density of a site, or whether the program runs at all, does.
    """
    with torch.random.fork_rng(devices=[]):  # a trial must not change what is drawn later
        clean = program.trials
        repeated = {s.name: s.as_path(clean[s.name]) for s in program.chains}
        known = program.evaluate(repeated, NUM_TRIALS)
        values = {name: _latent(known, name) for name in program.latents}
        reading: set[str] = set()
        for site in program.chains:
            for path in _histories(clean[site.name], site):
                given = {**repeated, **values, site.name: path}
                reading |= _differences(program, known, given, site)
    return frozenset(reading)


def _latent(run: ProgramRun, name: str) -> Tensor:
    value = run.value(name)
    assert value is not None  # latents are tensors
    return value


def _histories(clean: Tensor, site: ChainSite) -> Iterator[Tensor]:
    """Yield paths to the clean sequences: noise until the end, and noise that gives way."""
    chain = site.chain
    noise = chain.start(clean.shape[:-1])["tokens"]
    step = torch.arange(chain.num_steps + 1)[:, None]
    for first in (chain.num_steps, 1, 1):
        when = torch.randint(first, chain.num_steps + 1, clean.shape)
        yield torch.where(step < when[..., None, :], noise[..., None, :], clean[..., None, :])


def _differences(
    program: Program, known: ProgramRun, given: dict[str, Tensor], site: ChainSite
) -> set[str]:
    """Return the deterministic sites whose values differ; refuse other densities."""
    try:
        run = program.evaluate(given, NUM_TRIALS)
        names = {*known.density_names, *run.density_names}
        same = all(_same(known, run, name) for name in names)
    except Exception as error:  # whatever the program raises, it did not for the same sequences
        raise _refusal(program, site) from error
    if not same:
        raise _refusal(program, site)
    return {name for name in known.deterministic_names if not _same_value(known, run, name)}


def _same(known: ProgramRun, run: ProgramRun, name: str) -> bool:
    densities = known.site_log_density(name), run.site_log_density(name)
    return torch.allclose(*densities, rtol=1e-4, atol=1e-5)


def _same_value(known: ProgramRun, run: ProgramRun, name: str) -> bool:
    value, other = known.value(name), run.value(name)
    if value is None or other is None:
        return value is other
    return torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _refusal(program: Program, site: ChainSite) -> CapabilityError:
    return CapabilityError(
        f"{program.owner}: {program.name} reads the path at site {site.name!r}, not only its clean "
        "sequence chain.x0(path); use ppl_diffusion.inference.SMC with store_path=True."
    )
