"""What every resampling scheme must satisfy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppl_diffusion.smc import Resampler

MAX_Z = 5.0
"""Largest |z| of a mean count: false alarm rate 6e-7 per count, below 1e-4 per scheme."""


class ResamplerContract:
    """Inherit, implement :meth:`make_resampler`, and pytest runs the contract on your scheme::

    class TestMine(ResamplerContract):
        def make_resampler(self):
            return Mine()
    """

    replicates: int = 20_000

    def make_resampler(self) -> Resampler:
        """Return the scheme under test."""
        raise NotImplementedError

    @pytest.fixture(name="resampler")
    def _resampler(self) -> Resampler:
        return self.make_resampler()

    def ancestors(self, resampler: Resampler, log_weights: Tensor, seed: int = 0) -> Tensor:
        """Return ancestors for fresh uniforms, int64 shaped like the weights.

        :param log_weights: ``(*runs, N)``.
        :param seed: seed of the uniforms.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (*log_weights.shape[:-1], resampler.num_uniforms(log_weights.shape[-1]))
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
        return resampler(uniforms, log_weights)

    @pytest.mark.parametrize(
        "weights",
        [
            [0.5, 0.5],
            [0.7, 0.3],
            [0.05, 0.1, 0.15, 0.3, 0.4],
            [1.0, 1.0, 1.0, 1.0, 0.0],
            [0.0, 3.0, 1e-3, 0.0, 2.0, 2.0],
            [0.9, 0.02, 0.02, 0.02, 0.02, 0.01, 0.005, 0.005],
        ],
    )
    def test_expected_copies(self, resampler: Resampler, weights: list[float]) -> None:
        w = torch.tensor(weights, dtype=torch.float64)
        log_weights = (w.log() + 3.0).expand(self.replicates, -1)  # any scale
        chosen = self.ancestors(resampler, log_weights)
        copies = torch.nn.functional.one_hot(chosen, len(w)).sum(-2).to(torch.float64)
        assert bool((copies.sum(-1) == len(w)).all())
        expected = len(w) * w / w.sum()
        error = copies.std(0) / self.replicates**0.5
        # A count that never varies must be exactly its expectation.
        assert bool(((copies.mean(0) - expected).abs() <= MAX_Z * error + 1e-9).all())

    def test_never_a_particle_of_weight_zero(self, resampler: Resampler) -> None:
        generator = torch.Generator().manual_seed(3)
        log_weights = torch.randn(2000, 7, generator=generator, dtype=torch.float64) * 30
        log_weights[torch.rand(2000, 7, generator=generator) < 0.6] = -torch.inf
        chosen = self.ancestors(resampler, log_weights)
        alive = (log_weights > -torch.inf).any(-1)
        assert bool((log_weights.gather(-1, chosen)[alive] > -torch.inf).all())

    @pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
    def test_uniforms_at_the_ends(self, resampler: Resampler, u: float) -> None:
        log_weights = torch.tensor([-torch.inf, 0.0, -745.0, -torch.inf], dtype=torch.float64)
        uniforms = torch.full((resampler.num_uniforms(4),), u, dtype=torch.float64)
        chosen = resampler(uniforms, log_weights)
        assert bool((log_weights[chosen] > -torch.inf).all())

    def test_one_heavy_particle_takes_all(self, resampler: Resampler) -> None:
        log_weights = torch.tensor([-1e4, -torch.inf, 0.0, -1e4], dtype=torch.float64)
        chosen = self.ancestors(resampler, log_weights.expand(100, -1))
        assert bool((chosen == 2).all())

    def test_dead_run_stays_as_it_is(self, resampler: Resampler) -> None:
        log_weights = torch.full((3, 4), -torch.inf, dtype=torch.float64)
        log_weights[1] = 0.0
        chosen = self.ancestors(resampler, log_weights)
        assert chosen[0].tolist() == chosen[2].tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_bad_weights_are_refused(self, resampler: Resampler, bad: float) -> None:
        log_weights = torch.tensor([0.0, bad], dtype=torch.float64)
        with pytest.raises(ValueError, match="NaN or"):
            self.ancestors(resampler, log_weights)

    def test_wrong_number_of_uniforms_is_refused(self, resampler: Resampler) -> None:
        uniforms = torch.rand(resampler.num_uniforms(4) + 1, dtype=torch.float64)
        with pytest.raises(ValueError, match="needs uniforms"):
            resampler(uniforms, torch.zeros(4, dtype=torch.float64))

    def test_runs_are_independent(self, resampler: Resampler) -> None:
        generator = torch.Generator().manual_seed(4)
        log_weights = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        shape = (5, resampler.num_uniforms(6))
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
        together = resampler(uniforms, log_weights)
        alone = [resampler(u, w) for u, w in zip(uniforms, log_weights, strict=True)]
        assert torch.equal(together, torch.stack(alone))

    def test_single_particle(self, resampler: Resampler) -> None:
        log_weights = torch.zeros(3, 1, dtype=torch.float64)
        assert self.ancestors(resampler, log_weights).tolist() == [[0], [0], [0]]
