"""Refinement: half the budget on particles, the other half on moves of the finished sequences.

SMC is good at getting to where the posterior is, and its particles then share a few ancestors;
Markov chains are good at spreading from there. ``B`` *heads* are drawn from each run by weight, and
each is moved by kernels that leave ``p(path) G(x0)`` alone: mask again, reveal again
(:mod:`ppl_diffusion.smc.refill`).

The evidence is that of the particles, and nothing is lost by starting the chains from them, however
badly those mix. With ``Z^`` the evidence of a run and ``W`` its weights, ``E[Z^ sum_i W_i f(x_i)]``
is ``Z pi(f)`` for every ``f``. Heads are drawn with ``E[f(head_b) | particles] = sum_i W_i f(x_i)``
(stratified, in random order), so ``E[Z^ f(head_b)] = Z pi(f)``. For a kernel ``K`` with ``pi K =
pi``, put ``K f`` for ``f``: ``E[Z^ f(K head_b)] = Z pi(K f) = Z pi(f)``; by induction the same is
true of every state of every chain, so of the mean over any of them, chosen beforehand. All states
may be kept (waste-free: Dau and Chopin 2022, JRSS-B 84), runs pooled by ``Z^`` stay exact, and no
burn-in is needed. The proof needs moves and their number to be fixed before the particles are
looked at (a kernel tuned on the particles it moves is another kernel for each of them), so the
number of sweeps is computed from the *largest* cost of both halves; ``num_evaluations`` counts what
was really paid.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.arguments import require_moves
from ppl_diffusion.inference.path_moves import checked_moves, moved, side_by_side, small_type
from ppl_diffusion.kernels import EventKernel
from ppl_diffusion.potentials.budget import BudgetSpent
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.programs.bound import Bound, Mover
from ppl_diffusion.programs.method import Method, Needs, described, methods, register
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, PotentialLike, Rng, Source, State
from ppl_diffusion.smc.checkpoint import Stage
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.path_state import PathMove
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.refill import Refill, SiteGibbs
from ppl_diffusion.smc.rejuvenation import OrderRefresh, SuffixRefresh
from ppl_diffusion.smc.resampling import Resampler, Stratified
from ppl_diffusion.smc.twists import FillTwist
from ppl_diffusion.smc.weights import Weights

FEW_TOKENS = 8
"""Alphabets up to this size are asked about token by token."""
KEPT = ("sites", "latents", "log_r", "paths", "log_g", "values")
"""What moves need of a finished state."""


@register
@dataclass(frozen=True)
class Refinement(Method):
    """Move the finished sequences of another method: mask again, reveal again.

    Particles of a run that died are not refined; ``settings["not_refined"]`` names such runs.

    :param inner: the method that gets there: a name, or an instance; its weights must be exact for
        ``p(path) G(x0)``.
    :param moves: path moves of one sweep, in order; by default a new order of reveals and then,
        position by position in small alphabets, a refill elsewhere. Chains whose reveals are not
        random get a suffix of an eighth of their steps.
    :param share: share of the network rows that the inner method gets.
    :param num_chains: Markov chains per run, each of them moved as often; few long ones mix better
        than many short ones.
    :param num_sweeps: sweeps of the moves; None takes as many as the rest of the rows allows.
    :raises ValueError: if a number is not usable.

    Example::

        posterior = SMC(chain, reward, method="refinement", inner="twisted").run(seed=0)
    """

    inner: Method | str = "smc"
    moves: Sequence[PathMove] | None = None
    share: float = 0.5
    num_chains: int = 8
    num_sweeps: int | None = None

    name: ClassVar[str] = "refinement"
    needs: ClassVar[Needs] = Needs(free_chains=True)
    needs_paths: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", _inner(self.inner))
        if self.moves is not None:
            object.__setattr__(self, "moves", require_moves("Refinement", self.moves, exact=False))
        if not 0 < self.share < 1:
            raise ValueError(f"Refinement: share must lie between 0 and 1, got {self.share}.")
        for what in ("num_chains", "num_sweeps"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ValueError(f"Refinement: {what} must be >= 1, got {value}.")
        # The runner reads these of a method, and here they are those of the inner one.
        for name in ("ess_threshold", "holds_clamps", "keeps_paths"):
            object.__setattr__(self, name, getattr(self.guide, name))

    @property
    def guide(self) -> Method:
        """The inner method."""
        assert isinstance(self.inner, Method)
        return self.inner

    # The first half is the inner method's.

    def source(self, model: Any, potential: PotentialLike | None) -> Source:
        """Return the inner method's source."""
        return self.guide.source(model, potential)

    @property
    def fill(self) -> FillTwist:
        """The inner method's completions."""
        return self.guide.fill

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the inner method's mover, where it moves the chain that is to be refined."""
        mover = self.guide.mover(site, source, max_rows)
        if not isinstance(mover, BoundFeynmanKac):
            raise CapabilityError(
                f"Refinement: {self.guide.name!r} moves compositions of chains, and path moves "
                "leave the law of one chain alone; refine 'smc', 'twisted' or another method that "
                "moves the chain."
            )
        return mover

    def require(self, source: Source) -> None:
        """Refuse what the inner method refuses, and chains that read each other's sequences."""
        self.guide.require(source)
        super().require(source)

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Resample as the inner method does."""
        return self.guide.resampling(resampler, ess_threshold)

    def prepare(self, run: Bound, resampler: Resampler, ess_threshold: float) -> None:
        """Choose the moves, and how many sweeps of them the rows allow."""
        self.guide.prepare(run, resampler, ess_threshold)
        law = self.guide.law(run)
        if not (self.guide.exact and law.exact) or law.base != run.source.law.base:
            raise CapabilityError(
                f"Refinement: the moves leave p(path) * G(x0) alone, and the weights of "
                f"{self.guide.name!r} as it is asked for are not; refine another method."
            )
        chains = {site.name: site.chain for site in run.source.chains}
        moves = {name: self._moves_of(chain) for name, chain in chains.items()}
        run.notes |= {"refine/moves": moves, "refine/sweeps": self._sweeps(run, moves)}

    def _moves_of(self, chain: ReverseChain) -> tuple[PathMove, ...]:
        return checked_moves(default_moves(chain) if self.moves is None else self.moves, chain)

    def _sweeps(self, run: Bound, moves: dict[str, tuple[PathMove, ...]]) -> int:
        """Return how many sweeps cost the rest of the rows, none of either half being saved."""
        if self.num_sweeps is not None:
            return self.num_sweeps
        size = run.shape[1]
        elements = {name: run.sites[name].chain.batch_shape.numel() for name in moves}
        guided = size * sum(self._rows(run, name) * count for name, count in elements.items())
        sweep = sum(
            move.num_rows(run.sites[name].chain) * elements[name]
            for name, own in moves.items()
            for move in own
        )
        rest = guided * (1 - self.share) / self.share
        return max(1, round(rest / (min(self.num_chains, size) * max(sweep, 1.0))))

    @staticmethod
    def _rows(run: Bound, name: str) -> float:
        """Return how many rows a sequence of the first half costs."""
        kernel = run.movers[name].kernel
        if isinstance(kernel, EventKernel):
            return kernel.expected_rounds(run.sites[name].chain.num_free)
        return run.steps[name]

    def num_steps(self, run: Bound) -> int:
        """Return the steps of the inner method."""
        return self.guide.num_steps(run)

    def times(self, run: Bound) -> Tensor:
        """Return the times of the inner method."""
        return self.guide.times(run)

    def begin(self, run: Bound, generator: Rng) -> State:
        """Begin as the inner method does."""
        return self.guide.begin(run, generator)

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move as the inner method does."""
        return self.guide.move(run, state, group, generator)

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Look ahead as the inner method does."""
        return self.guide.look(run, state, group, generator)

    def pay(self, run: Bound, state: State) -> Tensor:
        """Pay what the inner method pays."""
        return self.guide.pay(run, state)

    def num_calls(self, run: Bound) -> int:
        """Return the calls of both halves."""
        return self.guide.num_calls(run)

    # The second half.

    def end(self, run: Bound, trace: SMCTrace) -> SMCTrace:
        """Draw heads, move them, and put what they passed through in the particles' place."""
        trace = self.guide.end(run, trace)
        run.notes["refine/rows"] = [run.num_evaluations]
        run.notes["refine/dead"] = (~trace.weights.alive).nonzero()[:, 0].tolist()
        state = self._finished(run, trace)
        size = run.shape[1]
        heads = _heads(trace.weights, min(self.num_chains, size))
        renewals = sum(move.renews for _, move in self._queue(run))
        slots, times = _kept(size, heads.shape[1], renewals, run.device)
        try:
            found = self._chains(run, run.gather(state, heads), set(times.tolist()))
        except BudgetSpent:
            return self._unmoved(run, trace, state)
        state = _slots(found, slots, times)
        run.notes["refine/rows"].append(run.num_evaluations - run.notes["refine/rows"][0])
        head = heads[:, slots]
        alive = trace.weights.alive
        own = torch.arange(size, device=run.device).expand_as(head)
        head = torch.where(alive[:, None], head, own)
        old = self._finished(run, trace)
        state = _by_run(alive, state, old)
        flat = torch.where(alive[:, None], 0.0, trace.weights.log)
        last = trace.ancestors[-1].gather(1, head)
        return replace(
            trace,
            carry={**trace.carry, **state},
            weights=Weights(flat),
            log_potential=torch.where(alive[:, None], state["log_g"], trace.log_potential),
            ancestors=torch.cat([trace.ancestors[:-1], last[None]]),
        )

    @staticmethod
    def _unmoved(run: Bound, trace: SMCTrace, state: State) -> SMCTrace:
        """Return the particles as they were before any move, with the weights they had.

        Where a budget ends is no matter of what the moves have found: states at which they were
        stopped would be too often those that ask little, so none of these is kept.
        """
        run.notes["refine/rows"].append(run.num_evaluations - run.notes["refine/rows"][0])
        run.notes["refine/cut"] = True
        warnings.warn(
            "the budget of a reward was spent before the moves of refinement were made, so the "
            "particles are those of the inner method; give a larger budget, or choose that method.",
            stacklevel=2,
        )
        return replace(trace, carry={**trace.carry, **state})

    def _finished(self, run: Bound, trace: SMCTrace) -> State:
        """Return what moves need of the particles, with their whole paths."""
        state: State = trace.carry
        paths = self.guide.paths(run, state) or run.own_paths(state, trace.paths())
        paths = {name: path.to(small_type(run, name)) for name, path in paths.items()}
        return _kept_of(state | {"paths": paths})

    def _chains(self, run: Bound, state: State, times: set[int]) -> dict[int, State]:
        """Return the states of all chains after some numbers of renewals."""
        queue = self._queue(run)
        stage = Stage(run, None, ("refine", len(queue), *run.shape))
        here = stage.begun() or {"state": state, "found": {0: state}, "done": 0, "made": 0}
        for name, move in queue[here["made"] :]:
            stage.boundary(partial(dict, here))
            here = _after(run, here, name, move, times)
        stage.boundary(partial(dict, here))
        found: dict[int, State] = here["found"]
        return {at: each for at, each in found.items() if at in times}

    @staticmethod
    def _queue(run: Bound) -> list[tuple[str, PathMove]]:
        """Return all moves to be made, with the sites they are made at."""
        sweep = [(name, move) for name, own in run.notes["refine/moves"].items() for move in own]
        return sweep * run.notes["refine/sweeps"]

    def paths(self, run: Bound, state: State) -> dict[str, Tensor] | None:
        """Return the paths after the moves."""
        return dict(state["paths"])

    def law(self, run: Bound) -> Law:
        """Return the law of the inner method, with the moves that leave it alone."""
        if "refine/cut" in run.notes:
            return self.guide.law(run)
        sweeps, moves = run.notes["refine/sweeps"], ", ".join(self._names(run))
        words = f"then {sweeps} sweep{'s' * (sweeps != 1)} of moves ({moves}) that leave it alone"
        queue = [move for _, move in self._queue(run)]
        unpaid = next((move.name for move in queue if not move.exact), None)
        if unpaid is not None:
            words = f"{words} but for what {unpaid!r} does not pay"
        law = self.guide.law(run)
        why = f"{law.why}; {words}" if law.why else words
        return law.but(why=why, exact=law.exact and unpaid is None)

    @staticmethod
    def _names(run: Bound) -> list[str]:
        moves = (move.name for own in run.notes["refine/moves"].values() for move in own)
        return list(dict.fromkeys(moves))

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """States of one chain are no offspring of resampling."""
        unknown = torch.full_like(posterior.log_evidence, torch.nan)
        return replace(self.guide.finish(posterior), evidence_variance=unknown)

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen by both halves, and what each of them cost."""
        rows, dead = run.notes["refine/rows"], run.notes["refine/dead"]
        return {
            **super().settings(run),
            "moves": self._names(run),
            "num_sweeps": 0 if "refine/cut" in run.notes else run.notes["refine/sweeps"],
            "inner_settings": {k: described(v) for k, v in self.guide.settings(run).items()},
            "inner_evaluations": rows[0],
            "move_evaluations": rows[1],
            **({"not_refined": dead} if dead else {}),
        }


def _after(
    run: Bound, here: State, name: str, move: PathMove, times: Collection[int]
) -> dict[str, Any]:
    """Return where the chains stand after one more move."""
    state = moved(run, here["state"], name, move, 1.0, None)
    done = here["done"] + move.renews
    found = {**here["found"], **({done: state} if done in times else {})}
    return {"state": state, "found": found, "done": done, "made": here["made"] + 1}


def default_moves(chain: ReverseChain) -> tuple[PathMove, ...]:
    """Return a whole order, then renewals of what is revealed last between orders of the tail.

    A whole order costs a row per step ``T`` and brings other positions to the end; the tail of
    about ``sqrt(2 T)`` steps is dealt as often as it has steps, so that both cost alike.
    """
    steps = chain.num_steps
    if not OrderRefresh.fits(chain):
        return (SuffixRefresh(max(1, steps // 8)),)
    depth = min(steps, max(1, round(math.sqrt(2 * steps))))
    width = min(chain.length, depth * -(-chain.length // steps))
    renew: PathMove = SiteGibbs() if chain.kernel.process.vocab_size <= FEW_TOKENS else Refill()
    if width < 2:
        return (OrderRefresh(), renew)
    tail = (OrderRefresh(window=width, tail=True), renew)
    return (OrderRefresh(), renew, *tail * (depth - 1))


def _inner(given: Method | str) -> Method:
    if isinstance(given, Refinement):
        raise ValueError("Refinement: the inner method is refined already; give what it refines.")
    if isinstance(given, Method):
        return given
    known = methods()
    if given not in known or given == Refinement.name:
        names = ", ".join(name for name in known if name != Refinement.name)
        raise ValueError(f"Refinement: unknown inner method {given!r}; choose one of {names}.")
    return known[given]()


def _heads(weights: Weights, count: int) -> Tensor:
    """Return stratified draws in random order, ``(R, B)``: each has the law of the weights."""
    shape = (len(weights.log), count)
    noise = uniforms((2, *shape), device=weights.log.device)
    # A dead run has no weights to draw by, and is put back as it was.
    log_w = torch.where(weights.alive[:, None], weights.log, 0.0)
    return Stratified().draw(noise[0], log_w).gather(1, noise[1].argsort(-1))


def _kept_of(state: State) -> State:
    return {name: value for name, value in state.items() if name in KEPT}


def _kept(size: int, chains: int, renewals: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the chain and the number of renewals of each state that is kept, evenly spaced."""
    slots = torch.arange(size, device=device)
    chain = slots * chains // size
    count = torch.bincount(chain, minlength=chains)
    place = slots - (count.cumsum(0) - count)[chain]
    return chain, ((place + 1) * (renewals + 1) - 1) // count[chain]


def _slots(states: dict[int, State], slots: Tensor, times: Tensor) -> State:
    """Return the kept states as particles."""
    order = sorted(states)
    at = torch.searchsorted(torch.tensor(order, device=times.device), times)
    every = side_by_side([_kept_of(states[sweep]) for sweep in order])
    runs = len(every["log_g"])
    return Bound.gather(every, (slots * len(order) + at).expand(runs, -1))


def _by_run(alive: Tensor, new: Any, old: Any) -> Any:
    """Return new states of living runs and old ones of the others."""
    if isinstance(new, dict):
        return {name: _by_run(alive, value, old[name]) for name, value in new.items()}
    if not isinstance(new, Tensor):
        return new
    return torch.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)
