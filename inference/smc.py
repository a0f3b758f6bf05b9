"""Sequential Monte Carlo for any Pyro program with reverse-chain sites.

The program is the model and nothing else. A particle holds the states of all its chains and one
draw of every other latent; chains move by their own reverse steps, in lockstep; the potential is
the program's own density of everything that is not a chain. Between steps the program is asked
about completed guesses of the unfinished sequences (the twist), whose answers telescope away, and
at the end about the sequences themselves::

    weight = p(latents, observations | x0) / r(latents)

with ``r`` the law the latents were drawn from at the start, given a first guess. Latents whose law
depends on the sequences are drawn anew whenever the program is asked. Take the program away from
here and give it to ``pyro.infer.Importance``: the answer is the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.inference._arguments import require_counts, require_program
from ppl_diffusion.inference._path_reading import require_sequences_only
from ppl_diffusion.inference._program import Program, ProgramRun
from ppl_diffusion.inference._sites import ChainSite, held_positions
from ppl_diffusion.potentials.base import AbstractPotential, Potential
from ppl_diffusion.smc.engine import Progress, smc_loop
from ppl_diffusion.smc.feynman_kac import (
    BoundFeynmanKac,
    EvaluatedPotential,
    FeynmanKac,
    take_particles,
)
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler, as_resampler
from ppl_diffusion.smc.twists import (
    ArgmaxFill,
    Carry,
    FillTwist,
    TwistLike,
    as_twist,
    log_mean_exp,
)


class SMC:
    """Posterior sampling for a program by sequential Monte Carlo.

    :param model: a Pyro program with one or more :class:`ReverseChain` sites. It must broadcast
        over one more plate on the left. Other latents, plates, ``factor``, ``obs``,
        :func:`~ppl_diffusion.handlers.clamp`, :func:`~ppl_diffusion.handlers.twist` (which then
        moves the particles of its sites) and ``infer={"steer": Steering(...)}`` hints (whose
        potential then serves as the look-ahead) are honoured.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param resampler: resampling scheme.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :param twist: look-ahead: ``"argmax"``, ``"persistent"``, ``"sample"``, a fill twist, or None.
    :param twist_every: evaluate it at every so many steps only.
    :param store_path: hand the program whole paths at the end and keep them; otherwise it sees
        the clean sequence repeated, and is refused if its density reads more of the path.
    :param max_rows: largest number of rows sent to a network at once.
    :param vectorize_particles: evaluate the program for all particles at once (values arrive as
        ``(particles, 1 for each plate a site is not in, ...)``); otherwise one after the other,
        which any program survives. The program is tried on a few random guesses before the run.
    :param progress: called with ``(steps done, steps in all)``.

    Example::

        posterior = SMC(assay, num_particles=256, num_runs=4).run(torch.tensor(12.0), seed=0)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        twist: TwistLike = "argmax",
        twist_every: int = 1,
        store_path: bool = True,
        max_rows: int | None = 4096,
        vectorize_particles: bool = True,
        progress: Progress | None = None,
    ) -> None:
        require_program("SMC", model)
        require_counts("SMC", num_particles, num_runs)
        resolved = as_twist(twist)
        if resolved is not None and not isinstance(resolved, FillTwist):
            raise ValueError(
                "SMC: a program is looked ahead by completions; use 'argmax', 'persistent', a fill "
                "twist or None (functions of the state belong to FeynmanKac)."
            )
        if twist_every < 1:
            raise ValueError(f"SMC: twist_every must be >= 1, got {twist_every}.")
        self.model = model
        self.num_particles, self.num_runs = num_particles, num_runs
        self.resampler, self.ess_threshold = as_resampler(resampler), ess_threshold
        self.twist, self.twist_every = resolved, twist_every
        self.store_path, self.max_rows, self.progress = store_path, max_rows, progress
        self.vectorize_particles = vectorize_particles

    def run(self, *args: Any, seed: int | None = None, **kwargs: Any) -> ParticlePosterior:
        """Sample the posterior of the program at these arguments.

        :param args: arguments of the program.
        :param seed: seed of this run; the global random state is left alone if it is given.
        :param kwargs: keyword arguments of the program.
        :returns: the weighted particles; ``samples`` holds every site, ``(R, N, ...)``.
        :raises ValueError: if the program has no chain site, or does not broadcast.
        :raises CapabilityError: if it is random from run to run, or reads paths that are not kept.
        :raises PotentialError: if a site's density is NaN or ``+inf``.
        """
        started = time.perf_counter()
        with torch.no_grad(), _seeded(seed):
            program = Program(
                self.model,
                args,
                kwargs,
                vectorize=self.vectorize_particles,
                owner="SMC",
                otherwise="pass vectorize_particles=False",
            )
            engine = ProgramEngine(program, self)
            trace = smc_loop(
                engine,
                engine.num_steps,
                self.num_particles,
                self.num_runs,
                self.resampler,
                self.ess_threshold,
                None,
                progress=self.progress,
            )
        fields = {**trace.posterior_fields(), "compact_path": engine.first_path(trace.carry)}
        return ParticlePosterior(
            x0=trace.carry[_tokens(engine.sites[0])],
            times=engine.times,
            samples=engine.samples,
            num_evaluations=engine.num_evaluations,
            num_potential_calls=program.num_rows,
            exact=True,
            target=engine.target,
            settings={**self._settings(), "num_steps": engine.num_steps, "seed": seed},
            seconds=time.perf_counter() - started,
            is_program=True,
            **fields,
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "resampler": self.resampler.name,
            "ess_threshold": self.ess_threshold,
            "twist": None if self.twist is None else self.twist.name,
            "twist_every": self.twist_every,
        }


class ProgramEngine:
    """A program as a bound Feynman-Kac model (see :func:`ppl_diffusion.smc.smc_loop`).

    :param program: the program with its arguments.
    :param options: the inference program's options.
    """

    def __init__(self, program: Program, options: SMC) -> None:
        self.program, self.options = program, options
        self._unkept = frozenset[str]()
        if not options.store_path:
            self._unkept = require_sequences_only(program) | {s.name for s in program.chains}
        self.sites = program.chains
        # Without look-ahead a first guess is still needed: other latents are drawn given it.
        self.fill = options.twist or ArgmaxFill()
        self.bound = {site.name: self._bind(site) for site in self.sites}
        self.num_steps = max(site.chain.num_steps for site in self.sites)
        self.samples: dict[str, Tensor] = {}
        self._surrogates = {
            site.name: EvaluatedPotential(_as_potential(site.steering.potential))
            for site in self.sites
            if site.steering is not None
        }
        self._rows = EvaluatedPotential(_RowPotential(self))

    def _bind(self, site: ChainSite) -> BoundFeynmanKac:
        model = FeynmanKac(site.chain, _no_potential, twist=self.fill, proposal=site.proposal)
        return model.bind(max_rows=self.options.max_rows)

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far, over all chains."""
        return sum(bound.num_evaluations for bound in self.bound.values())

    @property
    def times(self) -> Tensor:
        """The time grid of the (first) chain that moves at every common step."""
        kernels = [site.chain.kernel for site in self.sites]
        longest = next(kernel for kernel in kernels if kernel.num_steps == self.num_steps)
        return torch.as_tensor(longest.times)

    @property
    def target(self) -> str:
        """The law the particles are exact for, in words."""
        chains = ", ".join(f"{s.name!r} ({', '.join(_described(s))})" for s in self.sites)
        return (
            f"the posterior of the program {self.program.name} over all its latent sites, with "
            f"finite reverse chains {chains}; log_evidence estimates the log-density of its "
            "observations"
        )

    def init(self, runs: int, particles: int, generator: Any) -> Carry:
        """Return the noisiest states, and one draw of every other latent."""
        carry: Carry = {}
        for site in self.sites:
            own = self.bound[site.name].init(runs, particles, generator)
            carry |= _prefixed(own, site)
            if self.options.store_path:
                carry[_path(site)] = own["tokens"].new_empty(0)
                carry = self._extend_path(carry, site)
        if self.program.carried:
            carry |= self._draw_latents(carry, generator)
        return carry

    def _draw_latents(self, carry: Carry, generator: Any) -> Carry:
        guess = {s.name: self._fills(carry, s, 0, generator)[:, :, 0] for s in self.sites}
        shape = next(iter(guess.values())).shape[:2]
        size = shape.numel()
        run = self._run(guess, {}, size)
        drawn = {}
        for name in self.program.carried:
            value = run.value(name)
            assert value is not None
            drawn[_latent(name)] = value.reshape(*shape, *value.shape[1:])
        return {**drawn, _LATENT_LOG_PROB: run.latent_log_density().reshape(shape)}

    def move(self, carry: Carry, k: int, generator: Any) -> tuple[Carry, Tensor | float]:
        """Advance every chain whose own grid has a step here."""
        log_ratio: Tensor | float = 0.0
        for site in self.sites:
            own_step = self._local(site, k)
            if self._local(site, k + 1) > own_step:
                own = _unprefixed(carry, site)
                moved, ratio = self.bound[site.name].move(own, own_step, generator)
                carry = {**carry, **_prefixed(moved, site)}
                carry = self._extend_path(carry, site)
                log_ratio = log_ratio + ratio
        return carry, log_ratio

    def _local(self, site: ChainSite, k: int) -> int:
        """Return how many steps of its own a site has made after ``k`` common ones."""
        return k * site.chain.num_steps // self.num_steps

    def _extend_path(self, carry: Carry, site: ChainSite) -> Carry:
        if not self.options.store_path:
            return carry
        tokens = carry[_tokens(site)]
        kind = torch.uint8 if site.chain.kernel.process.num_states <= 256 else torch.int32
        new, old = tokens.to(kind)[..., None, :], carry[_path(site)]
        return {**carry, _path(site): new if old.numel() == 0 else torch.cat([old, new], -2)}

    def log_twist(self, carry: Carry, k: int, generator: Any) -> Tensor | None:
        """Return the program's log-density at the end, its look-ahead before."""
        if k == self.num_steps:
            return self._final(carry)
        if self.options.twist is None or k % self.options.twist_every:
            return None
        fills = {s.name: self._fills(carry, s, self._local(s, k), generator) for s in self.sites}
        if self._surrogates:
            return self._surrogate(fills)
        return log_mean_exp(self._lookahead(fills, carry), 2)

    def _fills(self, carry: Carry, site: ChainSite, k: int, generator: Any) -> Tensor:
        return self.bound[site.name].fills(self.fill, _unprefixed(carry, site), k, generator)

    def _surrogate(self, fills: Mapping[str, Tensor]) -> Tensor:
        total: Tensor | float = 0.0
        for name, surrogate in self._surrogates.items():
            value = surrogate.lookahead(fills[name])  # (R, N, num_fills, *plates)
            total = total + (value.flatten(3).sum(-1) if value.ndim > 3 else value)
        return log_mean_exp(torch.as_tensor(total), 2)

    def _lookahead(self, fills: Mapping[str, Tensor], carry: Carry) -> Tensor:
        """Return the program's look-ahead of each completion, ``(R, N, num_fills)``."""
        shape = next(iter(fills.values())).shape[:3]
        if not self.program.latents:  # a function of the sequences alone: once per distinct one
            flat = torch.cat([fills[s.name].flatten(3) for s in self.sites], -1)
            return self._rows.lookahead(flat)
        latents = {
            name: _per_fill(carry[_latent(name)], shape[2]).flatten(0, 2)
            for name in self.program.carried
        }
        run = self._run({n: f.flatten(0, 2) for n, f in fills.items()}, latents, shape.numel())
        log_g = run.log_density(lookahead=True).reshape(shape)
        return log_g - carry[_LATENT_LOG_PROB][..., None] if latents else log_g

    def rows_log_density(self, rows: Tensor, *, lookahead: bool) -> Tensor:
        """Return the program's density of clean sequences, when it has no other latents.

        :param rows: the sites' sequences side by side, int64 ``(B, sum of sizes)``.
        :param lookahead: score them as guesses.
        """
        sequences, start = {}, 0
        for site in self.sites:
            shape = (*site.chain.batch_shape, site.chain.length)
            stop = start + torch.Size(shape).numel()
            sequences[site.name] = rows[:, start:stop].reshape(len(rows), *shape)
            start = stop
        return self._run(sequences, {}, len(rows)).log_density(lookahead=lookahead)

    def _run(
        self, x0: Mapping[str, Tensor], latents: Mapping[str, Tensor], size: int
    ) -> ProgramRun:
        """Run the program on clean sequences, each repeated as if it were a whole path."""
        paths = {}
        for site in self.sites:
            clean = x0[site.name].reshape(size, *site.chain.batch_shape, site.chain.length)
            shape = (*clean.shape[:-1], site.chain.num_steps + 1, site.chain.length)
            paths[site.name] = clean[..., None, :].expand(shape)
        return self.program.evaluate({**paths, **latents}, size)

    def _final(self, carry: Carry) -> Tensor:
        shape = carry[_tokens(self.sites[0])].shape[:2]
        size = shape.numel()
        latents = {n: carry[_latent(n)].flatten(0, 1) for n in self.program.carried}
        if self.options.store_path:
            paths = {s.name: self._whole_path(carry, s, size) for s in self.sites}
            run = self.program.evaluate({**paths, **latents}, size)
        else:
            run = self._run({s.name: carry[_tokens(s)] for s in self.sites}, latents, size)
        self._keep_samples(run, shape)
        log_g = run.log_density().reshape(shape)
        return log_g - carry[_LATENT_LOG_PROB] if latents else log_g

    def _whole_path(self, carry: Carry, site: ChainSite, size: int) -> Tensor:
        shape = (size, *site.chain.batch_shape, *site.chain.event_shape)
        return carry[_path(site)].reshape(shape).to(torch.int64)

    def _keep_samples(self, run: ProgramRun, shape: torch.Size) -> None:
        for name in run.site_names:
            value = run.value(name) if run.is_latent_or_deterministic(name) else None
            if value is not None and name not in self._unkept:
                self.samples[name] = value.reshape(*shape, *value.shape[1:])

    def first_path(self, carry: Carry) -> Tensor | None:
        """Return the stored paths of the first chain site, or None.

        :param carry: the final carry.
        """
        return carry[_path(self.sites[0])] if self.options.store_path else None

    def gather(self, carry: Carry, ancestors: Tensor) -> Carry:
        """Return the carry of the chosen ancestors."""
        return {name: take_particles(value, ancestors) for name, value in carry.items()}


class _RowPotential(AbstractPotential):
    """The program as a potential of its sequences, side by side in one row."""

    name = "the program"

    def __init__(self, engine: ProgramEngine) -> None:
        self.engine = engine

    def log_potential(self, x0: Tensor) -> Tensor:
        return self.engine.rows_log_density(x0, lookahead=False)

    def lookahead(self, x0: Tensor) -> Tensor:
        return self.engine.rows_log_density(x0, lookahead=True)


_LATENT_LOG_PROB = "latent_log_prob"


def _described(site: ChainSite) -> list[str]:
    held = held_positions([(site.chain, site.clamp)])
    return [f"{site.chain.num_steps} steps", *held, *site.chain.kernel.changes]


def _tokens(site: ChainSite) -> str:
    return f"tokens/{site.name}"


def _path(site: ChainSite) -> str:
    return f"path/{site.name}"


def _latent(name: str) -> str:
    return f"latent/{name}"


def _prefixed(own: Carry, site: ChainSite) -> Carry:
    return {f"{key}/{site.name}": value for key, value in own.items()}


def _unprefixed(carry: Carry, site: ChainSite) -> Carry:
    ending = f"/{site.name}"
    return {key.removesuffix(ending): v for key, v in carry.items() if key.endswith(ending)}


def _per_fill(value: Tensor, num_fills: int) -> Tensor:
    return value[:, :, None].expand(*value.shape[:2], num_fills, *value.shape[2:])


def _no_potential(x0: Tensor) -> Tensor:
    return torch.zeros(x0.shape[:-1], dtype=torch.float64)


def _as_potential(potential: Any) -> AbstractPotential:
    return potential if isinstance(potential, AbstractPotential) else Potential(potential)


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
