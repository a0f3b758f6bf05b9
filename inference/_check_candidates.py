"""What a dry run can choose from: the programs that apply to a target, and their merits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import GradientProposal
from ppl_diffusion.inference._check_meters import MeteredDenoiser, MeteredPotential
from ppl_diffusion.inference._compositions import Composition
from ppl_diffusion.inference._program import Program
from ppl_diffusion.inference._task import PotentialLike, as_task
from ppl_diffusion.inference.baselines import BestOfN, ImportanceSampling
from ppl_diffusion.inference.correctors import Corrector
from ppl_diffusion.inference.smc import SMC
from ppl_diffusion.inference.soft_value import SoftValueGuidance
from ppl_diffusion.inference.steering import FKSteering
from ppl_diffusion.inference.twisted import TwistedSampler
from ppl_diffusion.kernels.base import ORDERED, SAMPLE_ONLY
from ppl_diffusion.smc import PersistentFill

BEST_OF_N, PLAIN = "best-of-n", "importance-sampling"
FILLS, CHILDREN, LOOKS, TOP = 4, 4, 4, 32
"""Completions per state, children per lineage, looks of strided steering, tokens asked about."""

Target = ReverseChain | Composition | Callable[..., Any]
Build = Callable[..., Any]


@dataclass(frozen=True)
class Candidate:
    """A program with its settings.

    :param name: how reports call it.
    :param build: ``(target, potential, num_particles=, num_runs=, store_path=) -> program``.
    :param rows: most network rows one particle can cost.
    :param calls: most sequences one particle can ask the potential about.
    :param why: when it is known to do well.
    """

    name: str
    build: Build
    rows: float
    calls: float
    why: str


@dataclass(frozen=True)
class Question:
    """A target with the programs that apply to it, the simplest first.

    :param target: what is sampled, as it was given.
    :param potential: the potential that was given.
    :param candidates: the programs; the first needs no look-ahead.
    :param pilot_target: the target of pilot runs.
    :param pilot_potential: the potential of pilot runs.
    :param args: arguments of pilot runs.
    :param kwargs: keyword arguments of pilot runs.
    :param denoiser: stopwatch of the network, where there is one.
    :param metered: stopwatch of the potential, where there is one.
    :param best_of: builds best-of-n, where that means anything.
    :param promise: names of the candidates in the order in which they are tried.
    """

    target: Target
    potential: PotentialLike | None
    candidates: tuple[Candidate, ...]
    pilot_target: Target
    pilot_potential: PotentialLike | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    denoiser: MeteredDenoiser | None = None
    metered: MeteredPotential | None = None
    best_of: Build | None = None
    promise: tuple[str, ...] = ()

    @property
    def in_order_of_promise(self) -> list[Candidate]:
        """The candidates in the order in which they are tried."""
        return sorted(self.candidates, key=lambda candidate: self.promise.index(candidate.name))

    @property
    def busy(self) -> float:
        """Seconds that network and potential took so far."""
        timed = (self.denoiser, self.metered)
        return sum(known.meter.seconds for known in timed if known is not None)

    def build(self, build: Build, size: int, runs: int) -> Any:
        """Return a program for the user.

        :param build: its builder.
        :param size: particles per run.
        :param runs: runs.
        """
        return build(self.target, self.potential, num_particles=size, num_runs=runs)

    def pilot(self, candidate: Candidate, size: int, runs: int, seed: int) -> Any:
        """Return the result of a pilot run.

        :param candidate: the program.
        :param size: particles per run.
        :param runs: runs.
        :param seed: its seed.
        :raises CapabilityError: if the program does not apply to the target after all.
        """
        program = candidate.build(
            self.pilot_target,
            self.pilot_potential,
            num_particles=size,
            num_runs=runs,
            store_path=False,
        )
        return program.run(*self.args, seed=seed, **(self.kwargs or {}))


def ask(
    target: Target,
    potential: PotentialLike | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    few_calls: bool,
    soft_potential: Callable[[Tensor], Tensor] | None,
) -> Question:
    """Read a target and list what applies to it.

    :param target: a reverse chain, a composition, or a Pyro program.
    :param potential: ``log G`` of a bare chain or on top of a composition.
    :param args: arguments of a program.
    :param kwargs: keyword arguments of a program.
    :param few_calls: whether potential calls are rationed.
    :param soft_potential: the potential as a differentiable function of soft sequences.
    """
    if isinstance(target, Composition):
        return _of_composition(target, potential)
    try:
        chain = as_task(target, potential, args, kwargs).chain
    except CapabilityError:
        return _of_program(target, args, kwargs)
    found = tuple(_of_chain(chain, soft_potential, few_calls))
    question = Question(
        target=target,
        potential=potential,
        candidates=found,
        pilot_target=target,
        pilot_potential=potential,
        args=args,
        kwargs=kwargs,
        best_of=BestOfN,
        promise=_promise(chain, found, few_calls),
    )
    return _metered(question) if isinstance(target, ReverseChain) else question


def _metered(question: Question) -> Question:
    """Return a question about a bare chain with stopwatches in its pilots."""
    task = as_task(question.target, question.potential)  # type: ignore[arg-type]
    denoiser, potential = (
        MeteredDenoiser(task.chain.kernel.denoiser),
        MeteredPotential(task.potential),
    )
    kernel = task.chain.kernel.with_denoiser(denoiser)
    old = task.chain
    chain = ReverseChain(kernel, old.length, prompt=old.prompt, given=old.given)
    return replace(
        question,
        pilot_target=chain,
        pilot_potential=potential,
        denoiser=denoiser,
        metered=potential,
    )


def _of_chain(
    chain: ReverseChain, soft_potential: Callable[[Tensor], Tensor] | None, few_calls: bool
) -> list[Candidate]:
    rows, steps = most_rows(chain), chain.num_steps
    found = [
        Candidate(PLAIN, ImportanceSampling, rows, 1, "the potential hardly selects"),
        *_steered(rows, steps, few_calls),
        Candidate(
            "soft-value",
            partial(SoftValueGuidance, num_children=CHILDREN),
            rows * CHILDREN,
            steps * CHILDREN,
            "few lineages, network cheap",
        ),
    ]
    if chain.kernel.capability != SAMPLE_ONLY:
        found += _twisted(chain, rows, soft_potential)
    return found


def _steered(rows: float, steps: int, few_calls: bool) -> list[Candidate]:
    every = max(1, steps // (LOOKS + 1))
    strided = Candidate(
        "steering-strided",
        partial(FKSteering, twist="argmax", every=every, interval=(every, steps)),
        rows,
        math.ceil(steps / every) + 1,
        f"expensive potential: scored at every {every} steps",
    )
    persistent = partial(FKSteering, twist=PersistentFill(FILLS))
    return [
        *([strided] if few_calls and every > 1 else []),
        Candidate("steering-argmax", FKSteering, rows, steps + 1, "large V, dear potential"),
        Candidate(
            "steering-persistent",
            persistent,
            rows,
            FILLS * steps + 1,
            "the likeliest completion means nothing",
        ),
    ]


def _twisted(
    chain: ReverseChain, rows: float, soft_potential: Callable[[Tensor], Tensor] | None
) -> list[Candidate]:
    size = chain.kernel.process.vocab_size
    steps, top = chain.num_steps, TOP if size > TOP else None
    if chain.kernel.capability == ORDERED:
        asked, twisted = chain.length * min(size, TOP), partial(TwistedSampler, top=top)
        why = "small V, cheap potential"
        persistent = partial(twisted, twist=PersistentFill(FILLS))
        found = [
            Candidate("clamped-argmax", twisted, rows, asked + 1, why),
            Candidate("clamped-persistent", persistent, rows, asked * FILLS + 1, why),
        ]
    else:
        why = "steps that move many positions"
        reweighted = partial(TwistedSampler, proposal="reweighted")
        found = [Candidate("reweighted", reweighted, rows, 16 * steps + 1, why)]
    if soft_potential is not None:
        why = "differentiable potential"
        build = partial(_with_gradient, soft_potential)
        found.append(Candidate("gradient", build, rows, 2 * steps + 1, why))
    return found


def _with_gradient(
    soft_potential: Callable[[Tensor], Tensor],
    target: Target,
    potential: PotentialLike | None,
    **options: Any,
) -> TwistedSampler:
    proposal = GradientProposal(soft_potential)
    return TwistedSampler(target, potential, twist="argmax", proposal=proposal, **options)  # type: ignore[arg-type]


def most_rows(chain: ReverseChain) -> float:
    """Return the most network rows a trajectory can cost.

    A masked chain whose network does not read the time pays only when a token has changed.

    :param chain: the chain.
    """
    kernel = chain.kernel
    cost = getattr(kernel.denoiser, "network_rows", 1) * math.prod(chain.batch_shape)
    reveals = kernel.process.absorbing and kernel.denoiser.time_free and kernel.markov
    frozen = kernel.capability == ORDERED or getattr(kernel, "ancestral", False)
    steps = min(kernel.num_steps, chain.length) if reveals and frozen else kernel.num_steps
    return float(steps * cost)


def _promise(chain: ReverseChain, found: tuple[Candidate, ...], few_calls: bool) -> tuple[str, ...]:
    """Return all names, those first that are worth a pilot if not all can have one."""
    small = chain.kernel.process.vocab_size <= TOP
    cheap = ["clamped-argmax"] if small and not few_calls else []
    first = [PLAIN, "gradient", *cheap, "steering-strided", "steering-argmax"]
    names = [candidate.name for candidate in found]
    return (*(n for n in first if n in names), *(n for n in names if n not in first))


def _of_composition(target: Composition, potential: PotentialLike | None) -> Question:
    chain = target.chains[0]
    rows = sum(most_rows(c) for c in target.chains)
    steps = chain.num_steps
    tilted = potential is not None or target.potential is not None
    why = "powers, products and mixtures of chains"
    found = [Candidate("corrector", Corrector, rows, steps + 1 if tilted else 0, why)]
    masked = chain.kernel.process.absorbing
    if tilted and masked:
        asked = chain.length * chain.kernel.process.vocab_size + 1
        build = partial(Corrector, clamp=True)
        found.append(Candidate("corrector-clamped", build, rows, asked, "small V, cheap potential"))
    names = tuple(candidate.name for candidate in found)
    return Question(target, potential, tuple(found), target, potential, promise=names)


def _of_program(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Question:
    """Return the question of a program that is no potential of one sequence: only SMC takes it."""
    chains = [site.chain for site in Program(model, args, kwargs).chains]
    rows, steps = sum(map(most_rows, chains)), max(chain.num_steps for chain in chains)
    settings: list[tuple[str, dict[str, Any], float, str]] = [
        (PLAIN, {"twist": None, "ess_threshold": 0.0}, 1, "the program hardly selects"),
        ("smc-argmax", {"twist": "argmax"}, steps + 1, "latents besides the chain, or several"),
        (
            "smc-persistent",
            {"twist": PersistentFill(FILLS)},
            FILLS * steps + 1,
            "the likeliest completion means nothing",
        ),
    ]
    found = tuple(
        Candidate(name, partial(_smc, **chosen), rows, calls, why)
        for name, chosen, calls, why in settings
    )
    names = tuple(candidate.name for candidate in found)
    return Question(model, None, found, model, None, args=args, kwargs=kwargs, promise=names)


def _smc(model: Callable[..., Any], potential: None, **options: Any) -> SMC:
    return SMC(model, **options)
