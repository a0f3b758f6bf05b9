"""A chain of tokens and of a latent beside them, along a path (LADD, arXiv 2510.18114).

One network call predicts both from both. A step that lowers both levels draws them independently;
what a path of steps that lower one at a time forgets is only what several tokens, or several slots
of the latent, have to do with each other when they are drawn at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, cast

import numpy as np
import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor

from ppl_diffusion.deferred import refuse_if
from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.latent import LATENT, LATENT_TIME, LatentDenoiser, LatentSpec
from ppl_diffusion.denoisers.prediction import HeadPrediction, Prediction
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import FACTORISED, GIVEN, SAMPLE_ONLY, Carry, Kernel
from ppl_diffusion.kernels.block_step import BlockStep
from ppl_diffusion.kernels.blocks import TOKENS, BlockSpec, Value
from ppl_diffusion.kernels.latent_solvers import Ancestral, LatentSolver
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.kernels.reveal_order import RevealOrder, ordered_law
from ppl_diffusion.kernels.state_step import StateStep
from ppl_diffusion.kernels.step import StepDistribution
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.base import Absorbing, Process
from ppl_diffusion.processes.gaussian import Gaussian

SOLVER = "solver"
"""Key of the carry: what a multistep solver remembers."""


class LatentKernel(Kernel):
    """Tokens and a latent that lose their noise along a path.

    The carry holds ``"tokens"``, int64 ``(*batch, L)``, and ``"latent"``: codes, int64
    ``(*batch, N)``, with the hole ``K`` where a slot is hidden, or float64 ``(*batch, N, d)``.

    :param process: absorbing process of the tokens.
    :param latent_process: how the latent is noised: an absorbing process over its codes, or a
        Gaussian one.
    :param denoiser: predictor of both, a :class:`~ppl_diffusion.denoisers.LatentDenoiser`.
    :param path: levels of tokens and latent.
    :param solver: how a continuous latent moves; DDPM's own steps by default. One without noise
        has no density, so that the kernel is ``SAMPLE_ONLY``.
    :param order: when each token is revealed, given the codes; the path then says how many steps
        there are, and at which levels the network is asked. Steps of tokens are tables of states,
        so that methods which change what the network predicts are refused.
    :raises CapabilityError: if the denoiser predicts no such latent, the tokens are not masked, or
        there is an order and the path does not finish codes before the first token.
    :raises ValueError: if an order is of other numbers of codes or steps.
    :raises TypeError: if the path is none, or a solver is given for codes.
    """

    markov = False

    def __init__(
        self,
        process: Process,
        latent_process: Absorbing | Gaussian,
        denoiser: LatentDenoiser,
        path: Path,
        *,
        solver: LatentSolver | None = None,
        order: RevealOrder | None = None,
    ) -> None:
        if not isinstance(path, Path):
            raise TypeError(f"LatentKernel: path must be a Path, got {type(path).__name__}.")
        super().__init__(process, denoiser, np.array([tokens for tokens, _ in path.levels]))
        self.spec = _checked_latent(denoiser, process, latent_process)
        self.latent_process, self.path = latent_process, path
        if solver is not None and self.spec.dim is None:
            raise TypeError("LatentKernel: codes are drawn, not solved for; leave the solver out.")
        self.solver = (solver or Ancestral()) if self.spec.dim is not None else None
        if order is not None:
            order.check(self.spec, path)
        self.order = order
        clean = self.spec.num_codes
        states = None if clean is None else clean + 1
        own = BlockSpec(self.spec.event_shape, states, clean)
        self.blocks: Mapping[str, BlockSpec] = MappingProxyType({LATENT: own})
        self.capability = FACTORISED if self.parts else SAMPLE_ONLY
        self._level: tuple[tuple[float, torch.Size, torch.device], Tensor] | None = None

    @property
    def parts(self) -> bool:
        """Whether copies of a particle part again: not where the latent moves without noise."""
        solver = self.solver
        return solver is None or solver.stochastic or not self.path.draws_latent

    @property
    def conditions(self) -> Mapping[str, int]:
        """What the law depends on besides tokens and latent."""
        own = super().conditions
        return {n: dims for n, dims in own.items() if n not in (LATENT, LATENT_TIME)}

    @property
    def can_hold(self) -> bool:
        """Known tokens stay once they are revealed."""
        return True

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""
        return type(other) is type(self) and self._key == other._key

    @property
    def _key(self) -> tuple[Any, ...]:
        process, latent = self.process, self.latent_process
        own = latent if isinstance(latent, Gaussian) else latent.schedule
        order = None if self.order is None else id(self.order)
        return (id(self.denoiser), process.schedule, own, self.path, self.solver, order)

    def to(self, device: torch.device | str) -> Self:
        """Move network and order, in place as modules do, where they can be moved."""
        if self.order is not None:
            self.order.to(device)
        return super().to(device)

    def check_length(self, length: int) -> None:
        """:raises ValueError: if an order is of another number of tokens."""
        super().check_length(length)
        if self.order is not None:
            self.order.check_length(length)

    def declared_parameters(self) -> list[Tensor] | None:
        """Return the tensors that the law reads, those of an order among them."""
        own = super().declared_parameters()
        return own if own is None or self.order is None else [*own, *self.order.parameters()]

    def moved(self, k: int) -> set[str]:
        """Return which of tokens and latent step ``k`` lowers the level of."""
        (x, y), (x_next, y_next) = self.path.levels[k : k + 2]
        return {name for name, falls in ((TOKENS, x_next < x), (LATENT, y_next < y)) if falls}

    # The noisiest state.

    def start_carry(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the carry of a noisiest state, the latent drawn from its noise."""
        carry = super().start_carry(tokens, generator, given=given)
        return self._remembering({**carry, LATENT: self._noise(tokens.shape[:-1], generator)})

    def resume(self, value: Value, given: Mapping[str, Tensor] | None = None) -> Carry:
        """Return the carry of a noisiest state that is known."""
        return self._remembering(super().resume(value, given))

    def _remembering(self, carry: Carry) -> Carry:
        if self.solver is None:
            return carry
        return {**carry, SOLVER: self.solver.start(carry[LATENT])}

    def _noise(self, batch: Sequence[int], generator: torch.Generator | None) -> Tensor:
        shape, size = (*batch, *self.spec.event_shape), self.spec.num_codes
        if size is not None:
            return torch.full(shape, size, dtype=torch.int64, device=self.device)
        kind, source = torch.float64, self.device if generator is None else generator.device
        drawn = torch.randn(shape, generator=generator, dtype=kind, device=source)
        return drawn.to(self.device)

    def prior_blocks(
        self, batch_shape: Sequence[int], length: int, *, prompt: Tensor | None = None
    ) -> dict[str, TorchDistribution]:
        """Return the law of a continuous latent; masks and holes are certain."""
        if self.spec.dim is None:
            return {}
        zeros = torch.zeros(self.spec.event_shape, dtype=torch.float64, device=self.device)
        return {LATENT: Normal(zeros, 1.0).expand((*batch_shape, *zeros.shape)).to_event(2)}

    def _blocks_log_prob(self, value: Mapping[str, Tensor]) -> Tensor:
        latent, size = value[LATENT], self.spec.num_codes
        if size is not None:
            hidden = (latent == size).all(-1)
            return torch.where(hidden, 0.0, -torch.inf).to(torch.float64)
        zero = torch.zeros((), dtype=latent.dtype, device=latent.device)
        return Normal(zero, 1.0).log_prob(latent).sum((-2, -1))

    # Steps.

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> BlockStep:
        """Return the law of the next tokens and latent, independent of each other given these."""
        self.check_step(k)
        moved = self.moved(k)
        tokens = self._token_law(carry, k, TOKENS in moved, fixed)
        return BlockStep({TOKENS: tokens, LATENT: self._latent_law(carry, k, LATENT in moved)})

    def _token_law(
        self, carry: Carry, k: int, moves: bool, fixed: Tensor | None
    ) -> StepDistribution:
        tokens = carry[TOKENS]
        if moves and self.order is not None:
            logits = self.order(carry[LATENT])[k - self.path.first_token_step]
            law = ordered_law(tokens, self.cavity_log_probs(carry, k), logits)
            return StateStep(law, tokens=tokens, fixed=fixed, validate_args=False)
        prediction = self.predict(carry, k) if moves else self._flat(tokens)
        levels = float(self.alphas[k]), float(self.alphas[k + 1])
        return TokenStep(
            self.process, tokens, prediction, *levels, fixed=fixed, validate_args=False
        )

    def _latent_law(self, carry: Carry, k: int, moves: bool) -> TorchDistribution:
        latent, process = carry[LATENT], self.latent_process
        u, s = self.path.levels[k][1], self.path.levels[k + 1][1]
        if isinstance(process, Absorbing):
            levels = [float(process.schedule.alpha(level)) for level in (u, s)]
            log_c = self._clean_latent(carry, k) if moves else _even(latent, process.vocab_size)
            return TokenStep(process, latent, log_c, *levels, validate_args=False)
        if not moves:
            return Delta(latent, event_dim=2)
        assert self.solver is not None
        return self.solver.law(process, latent, self._clean_latent(carry, k), u, s, carry[SOLVER])

    def advance(
        self, carry: Carry, value: Value, k: int, *, step: TorchDistribution | None = None
    ) -> Carry:
        """Return the carry after the move of step ``k``, with what the solver remembers of it."""
        after = super().advance(carry, value, k, step=step)
        moved = self.moved(k)
        if self.solver is None or self.solver.order == 1:
            return after
        assert isinstance(self.latent_process, Gaussian)
        own, latent, u = carry[SOLVER], carry[LATENT], self.path.levels[k][1]
        # The prediction jumps where tokens change: its differences across such a step mean nothing.
        if LATENT not in moved:
            return {**after, SOLVER: self.solver.forget(own)}
        told, jumps = self._clean_latent(carry, k), TOKENS in moved
        kept = self.solver.remember(self.latent_process, latent, told, u, own, jumps)
        return {**after, SOLVER: kept}

    # Predictions.

    def predict(self, carry: Carry, k: int) -> Prediction:
        """Return what the network predicts for the tokens at point ``k`` of the path."""
        length, denoiser = carry[TOKENS].shape[-1], self.latent_denoiser
        rows = self._rows(carry, k)[..., :length, :]
        return HeadPrediction(rows, denoiser.head, self.process.vocab_size, raw=True)

    def cavity_log_probs(self, carry: Carry, k: int) -> Tensor:
        """Return the predictions of the tokens as a table, float64 ``(*batch, L, V)``."""
        return self.predict(carry, k).dense().to(torch.float64)

    def guess(self, carry: Carry, k: int) -> dict[str, Tensor]:
        """Return the latent that the network predicts, slots that are known being certain."""
        latent, size = carry[LATENT], self.spec.num_codes
        if not self.path.draws_latent or self.path.levels[k][1] == 0:
            return {LATENT: latent}
        clean = self._clean_latent(carry, k)
        if size is None:
            return {LATENT: clean.to(latent.dtype)}
        return {LATENT: torch.where(latent == size, clean.argmax(-1), latent)}

    def asks_denoiser(self, carry: Carry, k: int) -> bool:
        """Return whether step ``k`` from this carry costs a network call."""
        return LATENT in self.moved(k) or super().asks_denoiser(carry, k)

    @property
    def latent_denoiser(self) -> LatentDenoiser:
        """The network, as what it is."""
        return cast(LatentDenoiser, self.denoiser)

    def _clean_latent(self, carry: Carry, k: int) -> Tensor:
        rows = self._rows(carry, k)[..., carry[TOKENS].shape[-1] :, :]
        clean = self.latent_denoiser.latent_head(rows).to(torch.float64)
        return checked_clean(clean, self.spec, rows.shape[:-2], type(self.denoiser).__name__)

    def _rows(self, carry: Carry, k: int) -> Tensor:
        tokens, (t, u) = carry[TOKENS], self.path.levels[k]
        told = u if self.solver is None else float(self.solver.label(u))
        level = self._told(told, tokens.shape[:-1], tokens.device)
        given = {**carry.get(GIVEN, {}), LATENT: carry[LATENT], LATENT_TIME: level}
        return self.latent_denoiser.joint(tokens, t, **given)

    def _told(self, level: float, batch: torch.Size, device: torch.device) -> Tensor:
        # The same tensor again, by which a cache knows the call that it has just answered.
        key = (level, batch, device)
        if self._level is None or self._level[0] != key:
            full = torch.full(batch, level, dtype=torch.float64, device=device)
            self._level = (key, full)
        return self._level[1]

    def _repr_options(self) -> str:
        solver = "" if self.solver is None else f", {self.solver!r}"
        order = "" if self.order is None else f", order of {self.order.token_steps} steps"
        return f", {self.path!r}{solver}{order}"


def checked_clean(clean: Tensor, spec: LatentSpec, batch: torch.Size, owner: str) -> Tensor:
    """Return what a network predicts for the latent, codes normalised; refuse what it cannot be.

    :param clean: log-probabilities ``(*batch, N, K)`` or vectors ``(*batch, N, d)``, float64.
    :param owner: name of the network, for the message.
    :raises ValueError: if the shape is another, or a number is NaN or infinite; of numbers at the
        latest when collected checks are read.
    """
    expected = (*batch, spec.num_slots, spec.num_codes or spec.dim)
    if tuple(clean.shape) != expected:
        raise ValueError(
            f"latent_head of {owner} returned shape {tuple(clean.shape)}, expected {expected}."
        )
    discrete = spec.num_codes is not None
    bad = (torch.isnan(clean) if discrete else ~torch.isfinite(clean)).any()
    refuse_if(
        bad,
        lambda: ValueError(
            f"latent_head of {owner} returned NaN{'' if discrete else ' or infinite numbers'}; "
            "look for a weight or an input that is no number."
        ),
    )
    return torch.log_softmax(clean, -1) if discrete else clean


def _even(latent: Tensor, num_codes: int) -> Tensor:
    level = torch.full((), -np.log(num_codes), dtype=torch.float64, device=latent.device)
    return level.expand(*latent.shape, num_codes)


def _checked_latent(
    denoiser: Denoiser, process: Process, latent_process: Absorbing | Gaussian
) -> LatentSpec:
    """Return what the latent of a denoiser is, after checking that it fits."""
    spec = getattr(denoiser, LATENT, None)
    if not isinstance(spec, LatentSpec):
        raise CapabilityError(
            f"LatentKernel: a {type(denoiser).__name__} predicts no latent; give a LatentDenoiser, "
            "or use InterpolatingKernel."
        )
    if not process.absorbing:
        raise CapabilityError(
            f"LatentKernel: the tokens must be masked, but the process is {process!r}; give an "
            "Absorbing one."
        )
    discrete = isinstance(latent_process, Absorbing)
    if discrete != (spec.num_codes is not None):
        raise CapabilityError(
            f"LatentKernel: the denoiser predicts {_described(spec)}, which {latent_process!r} "
            "does not noise; give Absorbing(K) for codes and Gaussian() for vectors."
        )
    if isinstance(latent_process, Absorbing) and latent_process.vocab_size != spec.num_codes:
        raise CapabilityError(
            f"LatentKernel: the denoiser has {spec.num_codes} codes, the process "
            f"{latent_process.vocab_size}; build both with one number."
        )
    return spec


def _described(spec: LatentSpec) -> str:
    return (
        f"{spec.num_slots} codes of {spec.num_codes}"
        if spec.dim is None
        else f"{spec.num_slots} vectors of {spec.dim}"
    )
