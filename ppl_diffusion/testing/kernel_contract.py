"""What every reverse kernel must satisfy."""

from __future__ import annotations

import pytest
import torch

from ppl_diffusion.kernels import Kernel
from ppl_diffusion.testing.dense import all_states, prior_law, state_index
from ppl_diffusion.testing.oracles import chi_square_p_value

FALSE_ALARM = 1e-4
"""Level of each chi-square test below; seeds are fixed, so a pass stays a pass."""


class KernelContract:
    """Inherit, implement :meth:`make_kernel`, and pytest runs the contract on your kernel.

    The kernel must be tiny (``S ** length`` at most a few hundred)::

        class TestMyKernel(KernelContract):
            def make_kernel(self):
                return MyKernel(Uniform(3), denoiser, num_steps=3)
    """

    length: int = 2

    def make_kernel(self) -> Kernel:
        """Return the kernel under test."""
        raise NotImplementedError

    @pytest.fixture(name="kernel")
    def _kernel(self) -> Kernel:
        return self.make_kernel()

    def test_declares_its_grid_and_capability(self, kernel: Kernel) -> None:
        assert kernel.capability in {"FACTORISED", "ORDERED", "SAMPLE_ONLY"}
        assert len(kernel.times) == kernel.num_steps + 1
        assert kernel.times[0] == 1
        assert kernel.times[-1] == 0

    def test_first_state_is_the_prior(self, kernel: Kernel) -> None:
        size, generator = kernel.process.num_states, torch.Generator().manual_seed(0)
        carry = kernel.init_carry((40, 50), self.length, generator=generator)
        tokens = carry["tokens"]
        assert tokens.shape == (40, 50, self.length)
        assert tokens.dtype == torch.int64
        law = prior_law(kernel.process, self.length)
        states = all_states(size, self.length)
        torch.testing.assert_close(kernel.prior_log_prob(states).exp(), law, rtol=0, atol=1e-12)
        counts = torch.bincount(state_index(tokens, size).flatten(), minlength=len(law))
        if int((law > 0).sum()) > 1:
            assert chi_square_p_value(counts, law) > FALSE_ALARM

    def test_every_step_is_normalised(self, kernel: Kernel) -> None:
        states = all_states(kernel.process.num_states, self.length)
        for k in range(kernel.num_steps):
            step = kernel.step({"tokens": states}, k)
            total = step.log_prob(states[:, None]).exp().sum(0)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)

    def test_samples_follow_the_density(self, kernel: Kernel) -> None:
        generator = torch.Generator().manual_seed(1)
        states = all_states(kernel.process.num_states, self.length)
        start = kernel.init_carry((1,), self.length, generator=generator)
        for k in range(kernel.num_steps):
            step = kernel.step(start, k)
            law = step.log_prob(states[:, None]).exp()[:, 0]
            drawn = step.sample((4000,), generator=generator)
            index = state_index(drawn, kernel.process.num_states).flatten()
            counts = torch.bincount(index, minlength=len(law))
            if int((law > 0).sum()) > 1:
                assert chi_square_p_value(counts, law / law.sum()) > FALSE_ALARM
            start = kernel.advance(start, drawn[0], k)

    def test_chain_ends_clean(self, kernel: Kernel) -> None:
        generator = torch.Generator().manual_seed(2)
        carry = kernel.init_carry((500,), self.length, generator=generator)
        for k in range(kernel.num_steps):
            step = kernel.step(carry, k)
            tokens = step.sample(generator=generator)
            assert bool((step.log_prob(tokens) > -torch.inf).all())
            carry = kernel.advance(carry, tokens, k)
        assert int(carry["tokens"].max()) < kernel.process.vocab_size

    def test_advance_leaves_the_old_carry_alone(self, kernel: Kernel) -> None:
        carry = kernel.init_carry((3,), self.length)
        before = carry["tokens"].clone()
        moved = kernel.advance(carry, torch.zeros_like(before), 0)
        assert torch.equal(carry["tokens"], before)
        assert moved is not carry

    def test_rows_do_not_see_each_other(self, kernel: Kernel) -> None:
        states = all_states(kernel.process.num_states, self.length)
        for k in range(kernel.num_steps):
            together = kernel.step({"tokens": states}, k).log_prob(states)
            alone = [kernel.step({"tokens": s[None]}, k).log_prob(s[None]) for s in states]
            torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-9)

    def test_step_outside_the_grid_is_refused(self, kernel: Kernel) -> None:
        carry = kernel.init_carry((1,), self.length)
        for k in (-1, kernel.num_steps):
            with pytest.raises(ValueError, match="step index"):
                kernel.step(carry, k)

    def test_same_as_is_about_the_law(self, kernel: Kernel) -> None:
        assert kernel.same_as(kernel)
        assert kernel.same_as(kernel.with_denoiser(kernel.denoiser))
        assert not kernel.same_as(object())
