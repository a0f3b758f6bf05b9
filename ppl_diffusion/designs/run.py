"""One design run from a job to its result and its folder."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.designs.alphabet import Alphabet
from ppl_diffusion.designs.brief import brief_text
from ppl_diffusion.designs.judging import compare, scores
from ppl_diffusion.designs.methods import infer
from ppl_diffusion.designs.program import Target
from ppl_diffusion.designs.question import Job
from ppl_diffusion.designs.ranking import Designs, rank_designs
from ppl_diffusion.designs.report import designs_csv, designs_table, save_plots, sequence_file
from ppl_diffusion.designs.scores import Columns
from ppl_diffusion.designs.spread import Spread, infer_apart
from ppl_diffusion.diagnostics import collapse, nearest_distance
from ppl_diffusion.diagnostics.claims import knows_ess
from ppl_diffusion.diagnostics.report import pooled_root_ancestors, root_ancestors
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.jobs.folder import MARKER, whole_folder
from ppl_diffusion.jobs.writing import evidence_entries, json_text, save_arviz, timeless
from ppl_diffusion.potentials.failures import REWARDS

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior
    from ppl_diffusion.smc.checkpoint import RunStore
    from ppl_diffusion.smc.engine import Progress

BRIEF = "brief.toml"
NUM_PRIOR_SAMPLES = 256
SET = 16
"""Designs of a run, and samples of the prior, that are compared with their neighbours."""
# Streams of random numbers that must not depend on each other.
_JUDGES, _PRIOR = 1, 2


@dataclass(frozen=True)
class Result:
    """A finished run.

    :param designs: distinct sequences, heaviest first; ``sequences`` are the same as text.
    :param columns: their scores, each ``(M,)``.
    :param summary: what ``summary.json`` holds.
    """

    target: Target
    posterior: ParticlePosterior
    designs: Designs
    sequences: list[str]
    columns: Columns
    summary: dict[str, Any]

    @property
    def job(self) -> Job:
        """The job, with every default filled in."""
        return self.target.job

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of ``designs.csv``, for ``pandas.DataFrame(result.table())``."""
        return designs_table(self.designs, self.columns, self.sequences)


def design(
    target: Target,
    *,
    progress: Progress | None = None,
    how: Spread | None = None,
    store: RunStore | None = None,
) -> Result:
    """Sample the posterior of a job, judge it, and compare it with the prior.

    :param how: how runs are spread, where the job asks for that.
    :param store: where the job is kept, if it is.
    :param progress: called with ``(steps done, steps in all)``.
    :raises ParticleCollapse: if no sequence that meets the hard constraints was found.
    """
    started = time.perf_counter()
    job = target.job
    if job.search.spread:
        posterior = infer_apart(target, how or Spread(1), store, progress)
    else:
        posterior = infer(target, job.search, progress)
    designs = rank_designs(posterior)
    columns = scores(target, designs.tokens, _stream(job, _JUDGES))
    samples = _prior_samples(target, job)
    prior = scores(target, samples, _stream(job, _JUDGES), prior=True)
    summary = {
        **summarise(posterior, designs, job, target.alphabet),
        "comparison": compare(designs, columns, prior),
        "collapse": _collapse(posterior, samples.cpu()),
        "num_prior_samples": NUM_PRIOR_SAMPLES,
        "seconds": time.perf_counter() - started,
    }
    return Result(target, posterior, designs, target.decode(designs.tokens), columns, summary)


def summarise(
    posterior: ParticlePosterior, designs: Designs, job: Job, alphabet: Alphabet
) -> dict[str, Any]:
    weights, eve = posterior.weights, posterior.eve
    joint = posterior.pooled_log_weights.flatten()
    known = knows_ess(posterior.settings)
    return {
        "prior": job.name,
        "method": job.search.method,
        **evidence_entries(posterior, job.search.method),
        "ess": (1.0 / (weights**2).sum(-1)).tolist() if known else [None] * posterior.num_runs,
        "ess_pooled": math.exp(-float(torch.logsumexp(2 * joint, 0))) if known else None,
        "num_dead_runs": int((~posterior.alive).sum()),
        "root_ancestors": [len(e[w > 0].unique()) for e, w in zip(eve, weights, strict=True)],
        "effective_root_ancestors": root_ancestors(posterior),
        "effective_root_ancestors_pooled": pooled_root_ancestors(posterior),
        "unique": len(designs),
        "num_particles": posterior.num_runs * posterior.num_particles,
        "evaluations": posterior.num_evaluations,
        "potential_calls": posterior.num_potential_calls,
        "exact": posterior.exact,
        "target": posterior.target,
        "law": posterior.law.to_json(),
        "seed": job.search.seed,
        "settings": {**job.settings(), **_work(posterior)},
        "alphabet": alphabet.settings(),
        "warnings": list(map(str, posterior.warnings)),
    }


def _work(posterior: ParticlePosterior) -> dict[str, Any]:
    """Return the entry of the settings about rewards that ran in workers; empty if none did."""
    return {name: value for name, value in posterior.settings.items() if name == REWARDS}


def _collapse(posterior: ParticlePosterior, samples: torch.Tensor) -> dict[str, Any]:
    """Say how different the draws of each run are, beside sets of prior samples of the same size.

    The sets are small: neighbours come nearer the more there are.
    """
    size = max(2, min(SET, posterior.num_particles))
    sets = samples.split(size)[: len(samples) // size]
    nearest = [float(nearest_distance(part).mean()) for part in sets]
    return {**collapse(posterior, size), "set": size, "prior_nearest": sum(nearest) / len(nearest)}


def write_run(result: Result, folder: Path, *, replace: bool) -> str | None:
    """Write the run folder, whole or not at all.

    The same seed gives the same bytes in every file but ``summary.json``, which holds the seconds.
    The ArviZ file and the plots come last, and decide nothing: what cannot be made is left out.

    :returns: what is left out and why, None if nothing is.
    :raises InputError: if the place cannot be taken.
    """
    designs, sequences = result.designs, result.sequences
    with whole_folder(folder, replace=replace) as place:
        kept = timeless(result.posterior)
        kept.save(place / "particles")
        (place / "designs.csv").write_text(
            designs_csv(designs, result.columns, sequences), encoding="utf-8"
        )
        name, text = sequence_file(result.target.alphabet, sequences, designs)
        (place / name).write_text(text, encoding="utf-8")
        if result.target.whole:
            (place / BRIEF).write_text(brief_text(result.job), encoding="utf-8")
        (place / MARKER).write_text(json_text(result.summary), encoding="utf-8")
        vocabulary = result.target.alphabet.vocabulary
        left_out = (save_arviz(kept, place, vocabulary), save_plots(kept, place / "plots"))
    return " ".join(filter(None, left_out)) or None


def _prior_samples(target: Target, job: Job) -> torch.Tensor:
    chain = target.chain
    # Half of a masked chain's steps reveal nothing in a given row; those cost no evaluation.
    kernel = chain.kernel.with_denoiser(EvaluatedDenoiser(chain.kernel.denoiser))
    cheaper, generator = ReverseChain(kernel, chain.length), _stream(job, _PRIOR)
    return chain.x0(cheaper.sample((NUM_PRIOR_SAMPLES,), generator=generator))


def _stream(job: Job, number: int) -> torch.Generator:
    # Seeds of neighbouring jobs must not meet: 0 is the run itself.
    return torch.Generator().manual_seed(job.search.seed * 16 + number)
