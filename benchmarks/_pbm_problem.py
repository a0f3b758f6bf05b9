"""Binding landscapes of all 8-mers: posteriors over measured sequences, exact by enumeration.

Protein binding microarrays give every DNA word of length 8 an E-score between -0.5 and 0.5 for one
transcription factor, the same for both strands (Barrera et al. 2016, Science 351). With the whole
space measured, every posterior ``P(x)**power G(x) / Z`` is a table of 65,536 numbers.

The prior ``P`` is a first-order Markov chain with the dinucleotide frequencies of native yeast
promoters, started from its stationary law; its masked chain reveals one position per step in random
order with the exact denoiser, so the finite chain has the law ``P`` itself and the declared target
is the ideal posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._problems import total_variation
from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.testing import all_states, state_index

FILE = Path("dna") / "pbm_8mer_escores.npz"
BASES = 4
NUM_BINS = 16

# Pairs of neighbours (rows: first base; A, C, G, T) in the 2,847 native fragments of 80 bases in
# the training part of Vaishnav et al. 2022 (Nature 603), by families of similar sequences.
DINUCLEOTIDES = (
    (23765, 12194, 11951, 20466),
    (13626, 9103, 8249, 13384),
    (12912, 9893, 8096, 11425),
    (17903, 13105, 13845, 24996),
)


class DataError(ValueError):
    """The measured landscape is absent or is not one."""


def find_data(path: Path | None) -> Path:
    """Return the file of E-scores.

    :param path: the file, the data folder that has it as ``dna/pbm_8mer_escores.npz``, or None.
    :raises DataError: if there is none.
    """
    if path is None:
        raise DataError(
            "benchmarks.pbm needs the measured 8-mers, which are not shipped: give --data the file "
            f"{FILE.name} or the folder with {FILE}, or set PPL_DIFFUSION_DATA to that folder."
        )
    found = path / FILE if path.is_dir() else path
    if not found.is_file():
        raise DataError(
            f"benchmarks.pbm: there is no file {found}; give --data the file {FILE.name} or the "
            f"folder with {FILE}."
        )
    return found


@dataclass(frozen=True, eq=False)
class Landscape:
    """The E-scores of every sequence of one length.

    :param scores: float64 ``(4 ** L,)`` of each factor, in the order of
        :func:`~ppl_diffusion.testing.state_index`.
    :param length: number ``L`` of bases.
    """

    scores: Mapping[str, Tensor]
    length: int

    @classmethod
    def load(cls, path: Path) -> Landscape:
        """Read a table that names one strand of every sequence.

        :param path: an ``.npz`` file with ``kmer`` (bases 0 to 3, ``(n, L)``), ``escore_x1e4``
            ``(n, factors)`` and ``tf``, the names of the factors as bytes.
        :raises DataError: if an array is missing, or a sequence has no score on either strand.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                words, scores = file["kmer"].astype(np.int64), file["escore_x1e4"] / 1e4
                names = [name.decode() for name in file["tf"]]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"benchmarks.pbm: {path} is no table of E-scores: {error}.") from error
        table = np.full((BASES ** words.shape[1], len(names)), np.nan)
        for strand in (words, BASES - 1 - words[:, ::-1]):
            table[state_index(torch.from_numpy(strand.copy()), BASES).numpy()] = scores
        if np.isnan(table).any():
            missing = int(np.isnan(table).any(1).sum())
            raise DataError(
                f"benchmarks.pbm: {path} leaves {missing} of {len(table)} sequences without a "
                "score; the exact answers need the whole space."
            )
        columns = torch.from_numpy(table).T.contiguous()
        return cls(dict(zip(names, columns, strict=True)), words.shape[1])

    def factor(self, name: str) -> Tensor:
        """Return the E-scores of a factor, ``(4 ** L,)``.

        :param name: such as ``"SIX6"``.
        :raises DataError: if it was not measured.
        """
        if name not in self.scores:
            raise DataError(
                f"benchmarks.pbm: the table has no factor {name!r}, only {', '.join(self.scores)}."
            )
        return self.scores[name]


def background() -> MarkovDenoiser:
    """Return the exact denoiser of the prior."""
    counts = torch.tensor(DINUCLEOTIDES, dtype=torch.float64)
    transition = counts / counts.sum(-1, keepdim=True)
    stationary = torch.linalg.matrix_power(transition, 256)[0]
    return MarkovDenoiser(stationary / stationary.sum(), transition, Absorbing(BASES))


@dataclass(frozen=True, eq=False)
class Problem:
    """A posterior ``P(x)**power G(x) / Z`` over all sequences of one length.

    :param name: how tables call it.
    :param words: what it asks for.
    :param log_g: ``log G`` of every sequence, float64 ``(4 ** L,)``.
    :param length: number ``L`` of bases.
    :param power: exponent of the prior.
    """

    name: str
    words: str
    log_g: Tensor
    length: int
    power: float = 1.0

    @cached_property
    def chain(self) -> ReverseChain:
        """The masked chain of the prior, one reveal per step in random order."""
        denoiser = background()
        kernel = OrderedKernel(denoiser.process, denoiser, length=self.length)
        return ReverseChain(kernel, length=self.length)

    @cached_property
    def sequences(self) -> Tensor:
        """Every sequence, int64 ``(4 ** L, L)``."""
        return all_states(BASES, self.length)

    @cached_property
    def log_p(self) -> Tensor:
        """Log-probability of every sequence under the prior, ``(4 ** L,)``."""
        return background().log_prob(self.sequences)

    @cached_property
    def log_z(self) -> float:
        """Log normalising constant of the posterior."""
        return float(torch.logsumexp(self._log_joint, 0))

    @cached_property
    def law(self) -> Tensor:
        """The posterior, ``(4 ** L,)``."""
        return (self._log_joint - self.log_z).exp()

    @cached_property
    def marginals(self) -> Tensor:
        """Law of the base at each position, ``(L, 4)``."""
        return self._frequencies(self.sequences, self.law)

    @cached_property
    def bins(self) -> Tensor:
        """Interval of ``log G`` of each sequence, int64 ``(4 ** L,)``.

        The intervals are about equally likely under the posterior.
        """
        value, order = self.log_g.sort()
        mass = self.law[order].cumsum(0)
        edges = torch.arange(1, NUM_BINS, dtype=torch.float64) / NUM_BINS
        cuts = value[torch.searchsorted(mass, edges).clamp_max(len(value) - 1)]
        return torch.bucketize(self.log_g, cuts)

    @property
    def importance_ess(self) -> float:
        """Effective sample size per draw of the prior, as a share (of a posterior at power 1)."""
        return float(torch.exp(2 * self.log_z - torch.logsumexp(self._log_joint + self.log_g, 0)))

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return ``log G``, float64 ``(*batch,)``.

        :param x0: int64 ``(*batch, L)``.
        """
        return self.log_g[state_index(x0, BASES)]

    def mean(self, values: Tensor) -> float:
        """Return a posterior expectation.

        :param values: of every sequence, ``(4 ** L,)``.
        """
        return float(self.law @ values)

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Return exact independent draws, int64 ``(num, L)``.

        :param num: how many.
        :param generator: source of randomness.
        """
        chosen = torch.multinomial(self.law, num, replacement=True, generator=generator)
        return self.sequences[chosen]

    def draw_paths(self, num: int, generator: torch.Generator) -> Tensor:
        """Return exact draws of the path posterior (power 1), int64 ``(num, L + 1, L)``.

        With the exact denoiser the order of the reveals is independent of the sequence.

        :param num: how many.
        :param generator: source of randomness.
        """
        rank = torch.rand(num, self.length, generator=generator).argsort(-1)
        revealed = rank[:, None] < torch.arange(self.length + 1)[:, None]
        return torch.where(revealed, self.draw(num, generator)[:, None], BASES)

    def marginal_distance(self, draws: Tensor) -> float:
        """Return the total variation of draws to the posterior, a mean over positions.

        :param draws: int64 ``(n, L)``.
        """
        weights = torch.full((len(draws),), 1 / len(draws), dtype=torch.float64)
        return float(total_variation(self._frequencies(draws, weights), self.marginals).mean())

    def bin_distance(self, draws: Tensor) -> float:
        """Return the total variation between the laws of :attr:`bins`.

        :param draws: int64 ``(n, L)``.
        """
        exact = torch.zeros(NUM_BINS, dtype=torch.float64).index_add(0, self.bins, self.law)
        found = torch.bincount(self.bins[state_index(draws, BASES)], minlength=NUM_BINS)
        return float(total_variation(found / len(draws), exact))

    @cached_property
    def exact_twist(self) -> Callable[[Mapping[str, Any], int], Tensor]:
        """``log E[G(x0) | x]`` of every unfinished state, by summation over its completions."""
        numerator, denominator = (
            _sums(log.exp(), self.length) for log in (self.log_p + self.log_g, self.log_p)
        )
        log_h = (numerator / denominator).log()
        return lambda carry, k: log_h[state_index(carry["tokens"], BASES + 1)]

    @property
    def _log_joint(self) -> Tensor:
        return self.power * self.log_p + self.log_g

    def _frequencies(self, sequences: Tensor, weights: Tensor) -> Tensor:
        hits = torch.nn.functional.one_hot(sequences, BASES).to(torch.float64)
        return torch.einsum("s,slv->lv", weights, hits)


def _sums(values: Tensor, length: int) -> Tensor:
    """Return sums over the masked positions of every state, ``((V + 1) ** L,)``."""
    table = values.reshape((BASES,) * length)
    for axis in range(length):
        table = torch.cat([table, table.sum(axis, keepdim=True)], axis)
    return table.reshape(-1)
