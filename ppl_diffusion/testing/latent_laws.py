"""What a path does to tokens and codes, by enumeration from the definitions.

Nothing here uses a kernel or a chain: states, holes and values are listed, each site moves by a row
of its own, and the exact bound is an average over all ways to hide a clean pair. Float64, cost
``S ** 2`` in the number ``(V + 1)^L (K + 1)^N`` of states: for toys that fit on a page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ppl_diffusion.denoisers.latent import LatentDenoiser
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.processes.schedules import Linear, Schedule
from ppl_diffusion.testing.latent_toys import LatentProblem, entropy


@dataclass(frozen=True, eq=False)
class LatentLaw:
    """What a denoiser generates along a path, and what the path's bound says of it.

    :param problem: the law of the data.
    :param joint: law of generated tokens and codes, ``(V,) * L + (K,) * N``; of tokens alone,
        ``(V,) * L``, where the path never draws the codes.
    :param bounds: exact NELBO of each sequence in nats, ``(V,) * L``, zero where it cannot occur.
    """

    problem: LatentProblem
    joint: Tensor
    bounds: Tensor

    @classmethod
    def of(
        cls,
        problem: LatentProblem,
        path: Path,
        denoiser: LatentDenoiser | None = None,
        *,
        token_schedule: Schedule | None = None,
        latent_schedule: Schedule | None = None,
    ) -> LatentLaw:
        """Follow every move of a denoiser along a path.

        :param denoiser: the problem's own by default; any other of the same shape, trained or not.
        :param token_schedule: linear by default, as the other.
        """
        states, network = _States(problem), denoiser or problem.denoiser()
        law, cost = states.start(), torch.zeros_like(problem.joint).flatten()
        for step in _steps(path, token_schedule or Linear(), latent_schedule or Linear()):
            probs = states.predict(network, step, law)
            cost = cost + states.cost(step, probs)
            law = states.move(step, probs, law)
        drawn = path.draws_latent
        return cls(problem, states.clean(law, drawn), _average(problem, cost, drawn))

    @property
    def tokens(self) -> Tensor:
        """Law of generated sequences, ``(V,) * L``."""
        return _tokens(self.joint, self.problem.length)

    @property
    def nelbo(self) -> float:
        """The exact bound, averaged over the data, in nats."""
        return float((self.problem.data * self.bounds).sum())

    @property
    def nll(self) -> float:
        """``E[-log p(x)]`` over the data, which the bound bounds."""
        return float(-torch.special.xlogy(self.problem.data, self.tokens).sum())

    @property
    def total_variation(self) -> float:
        """Distance of the generated sequences from the data."""
        return float((self.tokens - self.problem.data).abs().sum() / 2)


def total_correlations(
    problem: LatentProblem,
    path: Path,
    *,
    token_schedule: Schedule | None = None,
    latent_schedule: Schedule | None = None,
) -> list[float]:
    """Return what each step forgets, ``E TC(S | R)`` under the problem's law, in nats.

    ``S`` is what the step reveals and ``R`` what was revealed before. With the problem's own
    denoiser ``NELBO = H(X) + sum`` (tokens and codes all absorbing); only entropies of marginal
    tables are used here, no denoiser and no state.
    """
    table = problem.joint if path.draws_latent else problem.data
    entropies = _marginal_entropies(table)
    steps = _steps(path, token_schedule or Linear(), latent_schedule or Linear())
    kinds = [site >= problem.length for site in range(table.ndim)]
    return [_forgotten(entropies, [step.keeps(latent) for latent in kinds]) for step in steps]


@dataclass(frozen=True)
class _Step:
    """Keep-probabilities of tokens and codes before and after a step, and its levels before."""

    levels: tuple[float, float]
    tokens: tuple[float, float]
    latent: tuple[float, float]

    def keeps(self, latent: bool) -> tuple[float, float]:
        return self.latent if latent else self.tokens

    def reveal(self, latent: bool) -> float:
        before, after = self.keeps(latent)
        return 0.0 if before == after else (after - before) / (1 - before)


def _steps(path: Path, tokens: Schedule, latent: Schedule) -> list[_Step]:
    kept = [(float(tokens.alpha(x)), float(latent.alpha(y))) for x, y in path.levels]
    pairs = zip(path.levels[:-1], kept[:-1], kept[1:], strict=True)
    return [_Step(at, (a[0], b[0]), (a[1], b[1])) for at, a, b in pairs]


class _States:
    """Every state of a problem's tokens and codes, holes last, in lexicographic order."""

    def __init__(self, problem: LatentProblem) -> None:
        self.problem = problem
        self.latent = [site >= problem.length for site in range(problem.joint.ndim)]
        self.sizes = list(problem.joint.shape)
        self.all = _product([size + 1 for size in self.sizes])
        self.cells = _product(self.sizes)

    def start(self) -> Tensor:
        return (self.all == torch.tensor(self.sizes)).all(-1).double()

    def hidden(self, step: _Step) -> Tensor:
        """Return the law of the state before a step given each clean cell, ``(cells, S)``."""
        laws = torch.ones(len(self.cells), len(self.all), dtype=torch.float64)
        for site, size in enumerate(self.sizes):
            keep = step.keeps(self.latent[site])[0]
            here, clean = self.all[:, site], self.cells[:, site, None]
            laws = laws * (keep * (here == clean) + (1 - keep) * (here == size))
        return laws

    def predict(self, denoiser: LatentDenoiser, step: _Step, law: Tensor) -> list[Tensor]:
        """Return the predictions of each site at each state that is reached, ``(S, size)``."""
        moving = torch.tensor([step.reveal(latent) > 0 for latent in self.latent])
        asked = (law > 0) & (self.open & moving).any(-1)
        count, states = self.problem.length, self.all[asked]
        rows = denoiser.joint(
            states[:, :count],
            step.levels[0],
            latent=states[:, count:],
            latent_time=step.levels[1],
        ).detach()
        tokens, codes = denoiser.head(rows[:, :count]), denoiser.latent_head(rows[:, count:])
        sites = [*tokens.exp().double().unbind(1), *codes.exp().double().unbind(1)]
        return [torch.zeros(len(asked), x.shape[-1]).double().index_put((asked,), x) for x in sites]

    @property
    def open(self) -> Tensor:
        return self.all == torch.tensor(self.sizes)

    def cost(self, step: _Step, probs: list[Tensor]) -> Tensor:
        """Return ``rho E sum over holes of -log p(clean)`` for each clean cell, ``(cells,)``."""
        hidden = self.hidden(step)
        cost = torch.zeros(len(self.cells), dtype=torch.float64)
        for site, latent in enumerate(self.latent):
            if (rho := step.reveal(latent)) > 0:
                weight = hidden * self.open[:, site]
                chosen = probs[site].T[self.cells[:, site]]  # (cells, S)
                cost = cost - rho * torch.special.xlogy(weight, chosen).sum(-1)
        return cost

    def move(self, step: _Step, probs: list[Tensor], law: Tensor) -> Tensor:
        """Return the law of the state after a step."""
        moves = torch.ones(len(self.all), len(self.all), dtype=torch.float64)
        for site, size in enumerate(self.sizes):
            rho, here = step.reveal(self.latent[site]), self.all[:, site]
            stay = one_hot(here, size + 1).double()
            drawn = torch.nn.functional.pad(rho * probs[site], (0, 1), value=1 - rho)
            rows = torch.where(self.open[:, site, None], drawn, stay)
            moves = moves * rows[:, here]
        return law @ moves

    def clean(self, law: Tensor, drawn: bool) -> Tensor:
        """Return what is generated in the end, as a table."""
        table = law.reshape([size + 1 for size in self.sizes])
        for site, size in enumerate(self.sizes):
            unread = self.latent[site] and not drawn
            table = table.narrow(site, size, 1) if unread else table.narrow(site, 0, size)
        return table if drawn else table.reshape(self.sizes[: self.problem.length])


def _average(problem: LatentProblem, cost: Tensor, drawn: bool) -> Tensor:
    """Average the costs of pairs over the encoder, whose own log-probability counts if drawn."""
    joint, count = problem.joint, problem.length
    data = problem.data.reshape(*problem.data.shape, *[1] * (joint.ndim - count))
    encoder = torch.where(data > 0, joint / data, 0.0)
    bounds = torch.where(encoder > 0, encoder * cost.reshape(joint.shape), 0.0)
    return _tokens(bounds + torch.special.xlogy(encoder, encoder) * drawn, count)


def _tokens(table: Tensor, length: int) -> Tensor:
    return table.sum(tuple(range(length, table.ndim))) if table.ndim > length else table


def _product(sizes: list[int]) -> Tensor:
    return torch.tensor(list(itertools.product(*[range(size) for size in sizes])))


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(count + 1):
        yield from itertools.combinations(range(count), size)


def _marginal_entropies(table: Tensor) -> dict[tuple[int, ...], float]:
    sites = range(table.ndim)
    rest = {kept: [site for site in sites if site not in kept] for kept in _subsets(table.ndim)}
    return {kept: entropy(table.sum(gone) if gone else table) for kept, gone in rest.items()}


def _forgotten(entropies: dict[tuple[int, ...], float], keeps: list[tuple[float, float]]) -> float:
    """Average ``sum_i H(i | R) - H(S | R)`` over what is revealed before and by a step."""
    total, sites = 0.0, range(len(keeps))
    for when in itertools.product(("before", "now", "later"), repeat=len(keeps)):
        chance = 1.0
        for (before, after), moment in zip(keeps, when, strict=True):
            chance *= {"before": before, "now": after - before, "later": 1 - after}[moment]
        known = tuple(site for site in sites if when[site] == "before")
        drawn = [site for site in sites if when[site] == "now"]
        if chance > 0 and len(drawn) > 1:
            base = entropies[known]
            each = sum(entropies[tuple(sorted((*known, site)))] - base for site in drawn)
            total += chance * (each - (entropies[tuple(sorted((*known, *drawn)))] - base))
    return total
