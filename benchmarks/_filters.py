"""A hidden Markov model and its bootstrap filter in four libraries, each with the same arithmetic.

All draw the next state by the inverse of its distribution function, weigh by the emission, and
resample systematically when the effective sample size falls below half of the particles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SMCFilter
from torch import Tensor

from benchmarks import _rival_filters
from ppl_diffusion.smc.engine import smc_loop
from ppl_diffusion.smc.resampling import as_resampler

Filter = Callable[["HMM", int, int], float]
"""``(model, particles, seed) -> log evidence``."""


@dataclass(frozen=True)
class HMM:
    """A hidden Markov model with the symbols that were seen.

    :param initial: law of the first state, float64 ``(S,)``.
    :param transition: law of the next state by state, ``(S, S)``.
    :param emission: law of the symbol by state, ``(S, O)``.
    :param symbols: what was seen, int64 ``(T,)``.
    """

    initial: Tensor
    transition: Tensor
    emission: Tensor
    symbols: Tensor

    @classmethod
    def random(
        cls, num_steps: int, *, num_states: int = 8, num_symbols: int = 8, seed: int = 0
    ) -> HMM:
        """Return a random model with symbols drawn from it.

        :param num_steps: number ``T`` of symbols.
        :param num_states: number ``S`` of states.
        :param num_symbols: number ``O`` of symbols.
        :param seed: seed of all of it.
        """
        generator = torch.Generator().manual_seed(seed)

        def rows(*shape: int) -> Tensor:
            logits = torch.randn(shape, generator=generator, dtype=torch.float64)
            return torch.softmax(logits, -1)

        initial, transition = rows(num_states), rows(num_states, num_states)
        emission, state, symbols = rows(num_states, num_symbols), 0, []
        for k in range(num_steps):
            law = transition[state] if k else initial
            state = int(torch.multinomial(law, 1, generator=generator))
            symbols.append(int(torch.multinomial(emission[state], 1, generator=generator)))
        return cls(initial, transition, emission, torch.tensor(symbols))

    @property
    def num_steps(self) -> int:
        """Number ``T`` of symbols."""
        return len(self.symbols)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """What a filter looks things up in, see :data:`benchmarks._rival_filters.Tables`."""
        return {
            "start": self.initial.cumsum(-1).numpy(),
            "following": self.transition.cumsum(-1).numpy(),
            "log_g": self.emission.log().T[self.symbols].numpy(),
        }

    @property
    def log_evidence(self) -> float:
        """The exact log-probability of the symbols, by the forward algorithm."""
        law, total = self.initial, 0.0
        for symbol in self.symbols.tolist():
            joint = law * self.emission[:, symbol]
            total += float(joint.sum().log())
            law = (joint / joint.sum()) @ self.transition
        return total


class FilterEngine:
    """The bootstrap filter as :func:`~ppl_diffusion.smc.engine.smc_loop` runs it.

    :param model: what is filtered.
    """

    def __init__(self, model: HMM) -> None:
        self.start = model.initial.cumsum(-1)
        self.next = model.transition.cumsum(-1)
        self.log_g = model.emission.log().T[model.symbols]

    def init(self, runs: int, particles: int, generator: Any) -> dict[str, Tensor]:
        """Return particles before the first symbol."""
        return {"tokens": torch.zeros(runs, particles, dtype=torch.int64)}

    def move(
        self, carry: dict[str, Tensor], k: int, generator: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw the states of symbol ``k`` and weigh them by it."""
        state = carry["tokens"]
        ends = self.next[state] if k else self.start
        uniform = torch.rand(state.shape, generator=generator, dtype=torch.float64)
        state = (uniform[..., None] >= ends[..., :-1]).sum(-1)
        return {**carry, "tokens": state}, self.log_g[k][state]

    def log_twist(self, carry: dict[str, Tensor], k: int, generator: Any) -> None:
        """Return nothing: a bootstrap filter looks at what was seen only."""

    def gather(self, carry: dict[str, Tensor], ancestors: Tensor) -> dict[str, Tensor]:
        """Return the chosen ancestors."""
        return {name: value.gather(1, ancestors) for name, value in carry.items()}


def by_smc_loop(model: HMM, num_particles: int, seed: int) -> float:
    """Filter by the loop under all our methods."""
    return float(evidences(model, num_particles, 1, seed))


def evidences(model: HMM, num_particles: int, num_runs: int, seed: int) -> Tensor:
    """Return the log-evidence of independent runs of our filter, float64 ``(R,)``.

    :param model: what is filtered.
    :param num_particles: particles ``N`` per run.
    :param num_runs: runs ``R``.
    :param seed: their seed.
    """
    generator, scheme = torch.Generator().manual_seed(seed), as_resampler("systematic")
    with torch.no_grad():
        trace = smc_loop(
            FilterEngine(model), model.num_steps, num_particles, num_runs, scheme, 0.5, generator
        )
    return trace.log_evidence_steps[:, -1]


def by_bare_loop(model: HMM, num_particles: int, seed: int) -> float:
    """Filter by a loop of plain torch that does nothing but filter."""
    generator = torch.Generator().manual_seed(seed)
    start, following = model.initial.cumsum(-1), model.transition.cumsum(-1)
    log_g = model.emission.log().T[model.symbols]
    log_w, log_z = torch.zeros(num_particles, dtype=torch.float64), 0.0
    state, comb = torch.zeros(num_particles, dtype=torch.int64), torch.arange(num_particles)
    for k in range(model.num_steps):
        uniform = torch.rand(num_particles, generator=generator, dtype=torch.float64)
        ends = following[state] if k else start
        state = (uniform[:, None] >= ends[..., :-1]).sum(-1)
        log_w = log_w + log_g[k][state]
        total = torch.logsumexp(log_w, 0)
        weights = (log_w - total).exp()
        if k + 1 < model.num_steps and float(weights.dot(weights)) * num_particles > 2:
            log_z += float(total) - np.log(num_particles)
            offset = torch.rand(1, generator=generator, dtype=torch.float64)
            found = torch.searchsorted(weights.cumsum(0), (comb + offset) / num_particles)
            state, log_w = state[found.clamp_max_(num_particles - 1)], torch.zeros_like(log_w)
    return float(log_z + torch.logsumexp(log_w, 0) - np.log(num_particles))


class PyroModel:
    """The model, and the guide that proposes from its prior, as Pyro's filter wants them.

    :param model: what is filtered.
    :param observed: whether this is the model.
    """

    def __init__(self, model: HMM, observed: bool) -> None:
        self.model, self.observed = model, observed

    def init(self, state: Any) -> None:
        """Draw the states of the first symbol."""
        self._draw(state, 0, self.model.initial)

    def step(self, state: Any, k: int) -> None:
        """Draw the states of symbol ``k``."""
        self._draw(state, k, self.model.transition[state["x"]])

    def _draw(self, state: Any, k: int, law: Tensor) -> None:
        x = pyro.sample(f"x_{k}", dist.Categorical(law))
        if self.observed:
            state["x"] = x
            pyro.sample(
                f"y_{k}", dist.Categorical(self.model.emission[x]), obs=self.model.symbols[k]
            )


class EvidenceFilter(SMCFilter):
    """Pyro's filter, which forgets the evidence, with a sum that remembers it."""

    log_evidence = 0.0

    def _update_weights(self, model_trace: Any, guide_trace: Any) -> None:
        before = self.state._log_weights - self.state._log_weights.logsumexp(-1)
        super()._update_weights(model_trace, guide_trace)
        seen = next(
            s for s in model_trace.nodes.values() if s["type"] == "sample" and s["is_observed"]
        )
        self.log_evidence += float((before + seen["log_prob"].reshape(-1)).logsumexp(-1))


def by_pyro(model: HMM, num_particles: int, seed: int) -> float:
    """Filter by Pyro, without its checks, and without the evidence that it does not keep."""
    _run_pyro(SMCFilter, model, num_particles, seed)
    return float("nan")


def pyro_evidence(model: HMM, num_particles: int, seed: int) -> float:
    """Return the evidence of Pyro's filter; it costs a little more than the filter does."""
    return float(_run_pyro(EvidenceFilter, model, num_particles, seed).log_evidence)


def _run_pyro(cls: type[SMCFilter], model: HMM, num_particles: int, seed: int) -> Any:
    pyro.set_rng_seed(seed)
    run = cls(PyroModel(model, True), PyroModel(model, False), num_particles, 0)
    with pyro.validation_enabled(False):
        run.init()
        for k in range(1, model.num_steps):
            run.step(k)
    return run


def by_particles(model: HMM, num_particles: int, seed: int) -> float:
    """Filter by ``particles``."""
    return _rival_filters.by_particles(model.tables, num_particles)(seed)


def has_particles() -> bool:
    """Return whether ``particles`` can be imported."""
    return "particles" in _rival_filters.installed()


def filters() -> dict[str, Filter]:
    """Return the filters that can run here, ours first."""
    found = {"ours": by_smc_loop, "bare torch loop": by_bare_loop, "Pyro": by_pyro}
    return found | ({"particles": by_particles} if has_particles() else {})
