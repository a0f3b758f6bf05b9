"""What every denoiser must satisfy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.kernels import Process


class DenoiserContract:
    """Inherit, implement two methods, and pytest runs the contract on your denoiser::

    class TestMyDenoiser(DenoiserContract):
        def make_process(self):
            return Absorbing(4)

        def make_denoiser(self, process):
            return MyDenoiser(process)
    """

    length: int = 3
    tolerance: float = 1e-5
    """How closely float32 networks agree with themselves in another batch."""
    ignores_own_token: bool = False
    """Set where a cavity denoiser is one by construction (exact oracles)."""

    def make_process(self) -> Process:
        """Return the forward process."""
        raise NotImplementedError

    def make_denoiser(self, process: Process) -> Denoiser:
        """Return the denoiser under test.

        :param process: what :meth:`make_process` returned.
        """
        raise NotImplementedError

    @pytest.fixture(name="process")
    def _process(self) -> Process:
        return self.make_process()

    @pytest.fixture(name="denoiser")
    def _denoiser(self, process: Process) -> Denoiser:
        return self.make_denoiser(process)

    @pytest.fixture(name="tokens")
    def _tokens(self, process: Process) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(process.num_states, (4, 5, self.length), generator=generator)

    def test_declares_what_it_is(self, denoiser: Denoiser, process: Process) -> None:
        assert isinstance(denoiser, Denoiser)
        assert denoiser.kind in {"cavity", "posterior"}
        assert denoiser.vocab_size == process.vocab_size
        assert isinstance(denoiser.time_free, bool)

    @pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
    def test_returns_normalised_rows(self, denoiser: Denoiser, tokens: Tensor, t: float) -> None:
        log_c = denoiser(tokens, t)
        assert log_c.shape == (*tokens.shape, denoiser.vocab_size)
        assert log_c.is_floating_point()
        assert not bool(torch.isnan(log_c).any())
        total = torch.logsumexp(log_c, -1)
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("shape", [(), (1,), (2, 1, 3)])
    def test_any_batch_shape(
        self, denoiser: Denoiser, process: Process, shape: tuple[int, ...]
    ) -> None:
        tokens = torch.zeros((*shape, self.length), dtype=torch.int64)
        assert denoiser(tokens, 0.5).shape == (*shape, self.length, process.vocab_size)

    def test_rows_do_not_see_each_other(self, denoiser: Denoiser, tokens: Tensor) -> None:
        together = denoiser(tokens, 0.4).exp()
        alone = torch.stack(
            [torch.stack([denoiser(row, 0.4).exp() for row in block]) for block in tokens]
        )
        torch.testing.assert_close(together, alone, rtol=0, atol=self.tolerance)

    def test_keeps_its_promise_about_time(self, denoiser: Denoiser, tokens: Tensor) -> None:
        if not denoiser.time_free:
            pytest.skip("the denoiser does not claim to be time-free")
        late = denoiser(tokens, 0.1).exp()
        for early in (0.9, 1.0):  # at 1 a prompt is the only thing revealed
            torch.testing.assert_close(
                denoiser(tokens, early).exp(), late, rtol=0, atol=self.tolerance
            )

    def test_predicts_each_row_at_its_own_time(
        self, denoiser: Denoiser, process: Process, tokens: Tensor
    ) -> None:
        """Masked chains ask about rows that are differently far revealed at once."""
        if denoiser.time_free or not process.absorbing:
            pytest.skip("it does not read the time, or gets one for all rows")
        row, times = tokens[0, 0], torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
        together = denoiser(row.expand(3, -1), times).exp()
        alone = torch.stack([denoiser(row, float(t)).exp() for t in times])
        torch.testing.assert_close(together, alone, rtol=0, atol=self.tolerance)

    def test_leaves_its_input_alone(self, denoiser: Denoiser, tokens: Tensor) -> None:
        before = tokens.clone()
        denoiser(tokens, 0.5)
        assert torch.equal(tokens, before)

    def test_cavity_ignores_its_own_token(
        self, denoiser: Denoiser, process: Process, tokens: Tensor
    ) -> None:
        if not self.ignores_own_token:
            pytest.skip("not claimed")
        for site in range(self.length):
            changed = tokens.clone()
            changed[..., site] = (changed[..., site] + 1) % process.num_states
            here, there = denoiser(tokens, 0.4), denoiser(changed, 0.4)
            torch.testing.assert_close(
                here[..., site, :], there[..., site, :], rtol=0, atol=self.tolerance
            )
