"""The methods that are compared at few network evaluations, each a chain and a bound of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels.latent_solvers import DPMSolver, LatentSolver, Wide
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.models.latent import LatentDiffusion
from ppl_diffusion.models.program import DiffusionProgram

_TERMS = 8  # of a bound per sequence, at least
_OWN_ROWS, _ORDER_STEPS = 2048, 200
ORDERED = range(4, 11)
"""Evaluations at which an order is learned: there are two steps of tokens, and they are few."""


@dataclass(frozen=True)
class Method:
    """How a prior is sampled with a number of network evaluations.

    :param prior: what the prior's name begins and ends with, around that of the data set.
    :param path: the path of so many evaluations; None for masked diffusion without a latent.
    :param solver: how a continuous latent moves, by its steps of DDPM if None.
    :param steps: the only number of evaluations there is, of a prior whose noise was learned.
    :param order: the order of the tokens is learned, given the codes, for each path.
    """

    prior: str
    path: Callable[[LatentDiffusion, int], Path] | None = None
    solver: LatentSolver | None = None
    steps: int | None = None
    order: bool = False

    def takes(self, evaluations: int) -> bool:
        """Return whether that is measured."""
        return self.steps in (None, evaluations) and (not self.order or evaluations in ORDERED)

    def ready(self, program: Any, evaluations: int, rows: Tensor | None) -> Any:
        """Return the prior as it is run, learning what is still to be learned.

        :param rows: training sequences, int64 ``(n, L)``; None for some of the prior's own.
        """
        if not self.order:
            return program
        source = torch.Generator().manual_seed(0)
        path = latent_first(program, evaluations)
        if rows is None:
            chain = program.chain(path)
            rows = chain.x0(chain.sample((_OWN_ROWS,), generator=source))
        latent = program.split_steps(evaluations).first_token_step
        return program.learn_order(
            rows,
            latent_steps=latent,
            token_steps=evaluations - latent,
            steps=_ORDER_STEPS,
            generator=source,
        )

    def prior_name(self, dataset: str) -> str:
        """Return the name of the prior of a data set."""
        return self.prior.format(dataset)

    def chain(self, program: Any, evaluations: int) -> tuple[ReverseChain, str]:
        """Return the chain, and its path in words.

        :param program: the prior, of the family that the method is for.
        :param evaluations: network evaluations, one a step.
        """
        if self.path is None:
            what = "masked" if self.steps is None else "learned"
            return program.chain(num_steps=evaluations), f"{what}({evaluations})"
        found = self.path(program, evaluations)
        return program.chain(found, solver=self.solver), describe_path(found)

    def bound(self, program: Any, evaluations: int, rows: Tensor) -> Tensor | None:
        """Return the bound of that chain, bits per token, float64 ``(n,)``; None where none is.

        :param rows: held-out sequences, int64 ``(n, L)``.
        """
        if self.solver is not None:
            return None  # that of DDPM's steps is the bound of another chain
        source = torch.Generator().manual_seed(0)
        scale = rows.shape[-1] * math.log(2.0)
        repeats = -(-_TERMS // evaluations)
        if self.steps is not None:
            bits: Tensor = program.bound_terms(rows, num_times=repeats, generator=source).mean(0)
            return bits / scale
        if self.path is None:
            law, terms = program.chain(num_steps=evaluations).marginal(), repeats * evaluations
            found: Tensor = -law.log_prob_bound(rows, num_samples=terms, generator=source)
            return found / scale
        path = self.path(program, evaluations)
        bound = program.bound(rows, path, num_samples=repeats, generator=source).bound
        return None if bound is None else bound / scale


def latent_first(program: LatentDiffusion, evaluations: int) -> Path:
    """Return the path of SEQ as the model divides it, :meth:`LatentDiffusion.split_steps`."""
    return program.split_steps(evaluations)


def in_turns(program: LatentDiffusion, evaluations: int) -> Path:
    """Return the path on which latent and tokens take turns, in half steps.

    A latent path needs two evaluations: with one, the latent is not drawn.
    """
    return Path.ordered(evaluations // 2) if evaluations > 1 else Path.masked(1)


METHODS: Mapping[str, Method] = {
    "masked": Method("masked-{}"),
    "di-seq": Method("latent-{}", latent_first),
    "di-seq-order": Method("latent-{}", latent_first, order=True),
    "di-ordered": Method("latent-{}", in_turns),
    "co-seq": Method("latent-{}-co", latent_first),
    "co-seq-wide": Method("latent-{}-co", latent_first, Wide()),
    "co-seq-dpm": Method("latent-{}-co", latent_first, DPMSolver(order=2)),
    **{f"learned-{T}": Method(f"learned-{{}}-{T}", steps=T) for T in (2, 4, 10)},
}
"""Names of rows. ``di-seq-order`` is a latent and learned noise together: the order in which tokens
are shown, given the codes. With one step there is no noise to learn: that chain is the masked one.
A continuous latent moves by the steps of DDPM, which the bound is of, by wider ones that do not
take the prediction for known, or by DPM-Solver++(2M), which has no density."""


def describe_path(path: Path) -> str:
    """Return a path in a few characters."""
    if not path.draws_latent:
        return f"masked({path.num_steps})"
    latent = sum(tokens == 1.0 for tokens, _ in path.levels) - 1
    if path == Path.sequential(latent, path.num_steps - latent):
        return f"seq({latent}+{path.num_steps - latent})"
    return f"ordered({path.num_steps // 2})"


def count_parameters(program: DiffusionProgram) -> int:
    """Return how many parameters take part in sampling: codes do, though no gradient moves them,
    and an encoder does not, nor what learned how to hide.

    :param program: the prior.
    """
    network: Any = program.denoiser
    assert isinstance(network, nn.Module)
    learnt = {name: p.numel() for name, p in network.named_parameters()}
    codes = {name: b.numel() for name, b in network.named_buffers() if name == "codebook"}
    asleep = ("encoder.", "noise.")
    return sum(n for name, n in {**learnt, **codes}.items() if not name.startswith(asleep))
