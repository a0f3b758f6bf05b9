"""Mask one site of a finished sequence again, and propose its token by anchored guidance.

With ``c`` the law of tokens that the guide proposes at ``x`` with site ``i`` masked, and ``d`` the
denoiser's own, accept with probability::

    min(1,  d_i(v) g(x') c_i(x_i)  /  d_i(x_i) g(x) c_i(v))

One network row gives both ``d``. Which ``d`` that is decides what is left alone. Among the sites
that a path revealed last it is the very factor of ``p(path)``, so that ``p(path) G(x0)^beta`` is
invariant whatever the denoiser (and under a policy of reveals, which saw none of these tokens). Of
any site, it is the conditional law of ``p(x)`` only where all conditionals of the denoiser belong
to one joint law, those of a trained network never do
(:func:`ppl_diffusion.inference.order_inconsistency` measures by how much).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.anchored_guidance import Guidance
from ppl_diffusion.inference.path_moves import moved, small_type
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.sources import State
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.feynman_kac import per_particle
from ppl_diffusion.smc.path_state import PathModel, PathMove, PathState, accept, tilt
from ppl_diffusion.smc.refill import RevealMove
from ppl_diffusion.smc.reveals import RevealTable


class SiteLaws(NamedTuple):
    """What the denoiser and the guide say about one site of each row.

    :param log_d: float64 ``(B, V)``.
    :param log_c: float64 ``(B, V)``.
    """

    log_d: Tensor
    log_c: Tensor


@dataclass(frozen=True)
class Remask(RevealMove):
    """Propose another token for one site by guidance, weighed by prior, potential and guide.

    :param guidance: what proposes tokens; None takes that of the method that moves.
    :param where: one of the sites revealed ``"last"``, which is exact for any denoiser
        (:class:`~ppl_diffusion.smc.OrderRefresh` brings other sites there), or ``"anywhere"``,
        which is for a denoiser whose conditionals belong to one joint law.
    """

    guidance: Guidance | None = None
    where: Literal["last", "anywhere"] = "last"
    name = "remask"

    def __post_init__(self) -> None:
        if self.where not in ("last", "anywhere"):
            raise ValueError(f"Remask: where is 'last' or 'anywhere', got {self.where!r}.")

    @property
    def exact(self) -> bool:
        """Whether it leaves its law invariant for any denoiser."""
        return self.where == "last"

    def check(self, chain: ReverseChain) -> None:
        """Refuse chains whose reveals are not random, and moves without a guide."""
        super().check(chain)
        if self.guidance is None:
            raise CapabilityError(
                "Remask: nothing proposes its tokens; pass Remask(Guidance(measurement))."
            )

    def num_rows(self, chain: ReverseChain) -> float:
        """Return the one row that predicts the site."""
        return 1.0

    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Propose another token for one site of each path."""
        table = RevealTable.of(model, state)
        choice = self.choices(table)
        noise = uniforms((2, *choice.shape), generator=generator, device=choice.device)
        site = torch.where(choice, noise[0], -1.0).argmax(-1)
        log_d, log_c = self.laws(table, site, generator)
        token: Tensor = draw_categorical(log_c, noise[1, :, 0])
        token = torch.where(choice.any(-1), token, table.x0.gather(-1, site[:, None])[:, 0])
        x0 = table.x0.scatter(-1, site[:, None], token[:, None])
        old, new = (x.gather(-1, site[:, None]) for x in (table.x0, x0))
        ratio = (log_d - log_c).gather(-1, new) - (log_d - log_c).gather(-1, old)
        known = table.log_c.scatter(-1, site[:, None], log_d.gather(-1, new))
        # Elsewhere than at the end, what later reveals were worth has changed as well.
        log_reveals = table.whole(known) if self.exact else None
        proposed = model.state(table.path(x0, table.step_of), log_reveals)
        log_ratio = per_particle(table.whole(ratio[:, 0]))
        log_ratio = log_ratio + tilt(proposed.log_g, beta) - tilt(state.log_g, beta)
        return accept(state, proposed, log_ratio, generator)

    def choices(self, table: RevealTable) -> Tensor:
        """Return the sites that may be masked again, bool ``(B, L)``."""
        if self.where == "anywhere":
            return table.free
        return (table.step_of == table.step_of.amax(-1, keepdim=True)) & table.free

    def laws(
        self, table: RevealTable, site: Tensor, generator: torch.Generator | None = None
    ) -> SiteLaws:
        """Return the laws of a token of each row.

        :param site: int64 ``(B,)``.
        """
        assert self.guidance is not None
        x0, rows = table.x0, torch.arange(len(table.x0), device=table.x0.device)
        alone = torch.zeros_like(x0, dtype=torch.bool).scatter(-1, site[:, None], True)
        gone = alone if self.where == "anywhere" else self.choices(table) | alone
        seen = torch.where(gone, table.mask, x0)  # the state that the token was revealed from
        times = table.times(table.step_of, table.step_of.amax(-1).clamp_min(0))
        log_d = table.predict(rows, seen, times, rows, site)
        everywhere = log_d[:, None].expand(-1, x0.shape[-1], -1)  # read at the site alone
        masked = torch.where(alone, table.mask, x0)
        guided = self.guidance(
            masked, everywhere, {**table.given, "seen": seen}, generator=generator
        )
        return SiteLaws(log_d, guided.log_c[rows, site])


def by_default(move: PathMove, guidance: Guidance) -> PathMove:
    """Return a move with a guide, where it is one that lacks it."""
    own = isinstance(move, Remask) and move.guidance is None
    return replace(move, guidance=guidance) if own else move  # type: ignore[type-var]


def swept(
    run: Bound, trace: SMCTrace, moves: Mapping[str, Sequence[PathMove]], num_sweeps: int
) -> SMCTrace:
    """Return a run whose finished sequences were moved, with the weights that they have.

    For a kernel that leaves a law alone, weighted particles stand for it after as before.

    :param moves: by chain site.
    """
    state: State = trace.carry
    recorded = run.own_paths(state, trace.paths())
    paths = {name: path.to(small_type(run, name)) for name, path in recorded.items()}
    state = {**state, "paths": paths}
    for name, move in [(name, m) for name, own in moves.items() for m in own] * num_sweeps:
        state = moved(run, state, name, move, 1.0, None)
    return replace(trace, carry=state, log_potential=state["log_g"])
