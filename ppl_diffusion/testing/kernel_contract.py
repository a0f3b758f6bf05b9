"""What every reverse kernel must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import SAMPLE_ONLY, Kernel
from ppl_diffusion.kernels.base import Carry, tokens_of
from ppl_diffusion.testing.dense import all_states, prior_law, state_index
from ppl_diffusion.testing.oracles import chi_square_p_value

FALSE_ALARM = 1e-4
"""Level of each chi-square test below; seeds are fixed, so a pass stays a pass."""

MAX_PATHS = 200_000
"""Most unfinished paths that are followed at once."""


class KernelContract:
    """Inherit, implement :meth:`make_kernel`, and pytest runs the contract on your kernel.

    The kernel must be tiny (all its paths are followed)::

        class TestMyKernel(KernelContract):
            def make_kernel(self):
                return MyKernel(Uniform(3), denoiser, num_steps=3)

    A kernel whose density is no function of carry and value, or does not sum to one, must say
    ``SAMPLE_ONLY``: the questions about densities are then skipped.
    """

    length: int = 2
    tolerance: float = 1e-9
    """How far totals may be from one; more where a continuous block is summed by quadrature."""

    def make_kernel(self) -> Kernel:
        """Return the kernel under test."""
        raise NotImplementedError

    def make_given(self) -> Mapping[str, Tensor]:
        """Return values of the kernel's conditions, without batch dimensions."""
        return {}

    def block_grid(self, name: str) -> tuple[Tensor, Tensor]:
        """Return points ``(m, *event)`` and weights ``(m,)`` that sum over a block of a step.

        :param name: a name of ``kernel.blocks``.
        """
        raise NotImplementedError(f"give a grid for the block {name!r}")

    @pytest.fixture(name="kernel")
    def _kernel(self) -> Kernel:
        return self.make_kernel()

    def _start(self, kernel: Kernel, tokens: Tensor, seed: int = 0) -> Carry:
        generator = torch.Generator().manual_seed(seed)
        return kernel.start_carry(tokens, generator, given=self.make_given())

    def _init(self, kernel: Kernel, batch: tuple[int, ...], generator: torch.Generator) -> Carry:
        given = self.make_given()
        return kernel.init_carry(batch, self.length, generator=generator, given=given)

    def _values(self, kernel: Kernel) -> _Values:
        """Return everything a step can draw, with weights that sum over it."""
        states = all_states(kernel.process.num_states, self.length)
        weights, blocks = torch.ones(len(states), dtype=torch.float64), {"tokens": states}
        for name in kernel.blocks:
            points, own = self.block_grid(name)
            here, there = torch.meshgrid(
                torch.arange(len(weights)), torch.arange(len(points)), indexing="ij"
            )
            blocks = {n: x[here.flatten()] for n, x in blocks.items()}
            blocks[name] = points[there.flatten()]
            weights = weights[here.flatten()] * own[there.flatten()]
        return _Values(blocks if kernel.blocks else states, weights)

    def test_declares_its_grid_and_capability(self, kernel: Kernel) -> None:
        assert kernel.capability in {"FACTORISED", "ORDERED", "SAMPLE_ONLY"}
        assert len(kernel.times) == kernel.num_steps + 1
        assert kernel.times[0] == 1
        assert kernel.times[-1] == 0
        assert set(kernel.conditions) == set(self.make_given())
        assert not (kernel.blocks and kernel.markov)

    def test_first_state_is_the_prior(self, kernel: Kernel) -> None:
        size, generator = kernel.process.num_states, torch.Generator().manual_seed(0)
        tokens = self._init(kernel, (40, 50), generator)["tokens"]
        assert tokens.shape == (40, 50, self.length)
        assert tokens.dtype == torch.int64
        law = prior_law(kernel.process, self.length)
        states = all_states(size, self.length)
        torch.testing.assert_close(kernel.prior_log_prob(states).exp(), law, rtol=0, atol=1e-12)
        counts = torch.bincount(state_index(tokens, size).flatten(), minlength=len(law))
        if int((law > 0).sum()) > 1:
            assert chi_square_p_value(counts, law) > FALSE_ALARM

    def test_the_density_is_a_function_of_carry_and_value(self, kernel: Kernel) -> None:
        """Asked again, or of the same step made again, with the global generator moved."""
        require_density(kernel)
        generator = torch.Generator().manual_seed(3)
        carry = self._init(kernel, (50,), generator)
        for k in range(kernel.num_steps):
            step = kernel.step(carry, k)
            value = step.sample(generator=generator)
            first = step.log_prob(value)
            torch.rand(3)
            assert torch.equal(step.log_prob(value), first)
            assert torch.equal(kernel.step(carry, k).log_prob(value), first)
            carry = kernel.advance(carry, value, k)

    def test_every_step_is_normalised(self, kernel: Kernel) -> None:
        require_density(kernel)
        values = self._values(kernel)
        carry = self._start(kernel, all_states(kernel.process.num_states, self.length))
        for k in range(kernel.num_steps):
            total = values.total(kernel.step(carry, k).log_prob(values.column))
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=self.tolerance)

    def test_paths_have_mass_one(self, kernel: Kernel) -> None:
        """Given whatever a start draws, all that can follow sums to one."""
        require_density(kernel)
        values = self._values(kernel)
        for seed in range(2):
            states = all_states(kernel.process.num_states, self.length)
            log_p = kernel.prior_log_prob(states)
            carry = self._start(kernel, states, seed)
            carry, log_p = _possible(carry, log_p)
            for k in range(kernel.num_steps):
                carry, log_p = _followed(kernel, carry, log_p, k, values)
            torch.testing.assert_close(
                float(log_p.exp().sum()), 1.0, rtol=0, atol=10 * self.tolerance
            )

    def test_path_density_is_a_function_of_the_path(self, kernel: Kernel) -> None:
        """It is the product of the steps, however often it is asked; clones are not remembered."""
        require_density(kernel)
        chain = ReverseChain(kernel, self.length, given=self.make_given())
        path = chain.sample((50,), generator=torch.Generator().manual_seed(4))
        remembered, first = chain.log_prob(path), chain.log_prob(path.clone())
        torch.rand(3)
        assert torch.equal(chain.log_prob(path.clone()), first)
        torch.testing.assert_close(remembered, first, rtol=1e-9, atol=1e-9)

    def test_samples_follow_the_density(self, kernel: Kernel) -> None:
        require_density(kernel)
        generator, values = torch.Generator().manual_seed(1), self._values(kernel)
        start = self._init(kernel, (1,), generator)
        size = kernel.process.num_states
        for k in range(kernel.num_steps):
            step = kernel.step(start, k)
            mass = step.log_prob(values.column).exp()[:, 0] * values.weights
            cells = state_index(tokens_of(values.value), size)
            law = mass.new_zeros(size**self.length).index_add(0, cells, mass)
            drawn = step.sample((4000,), generator=generator)
            counts = torch.bincount(
                state_index(tokens_of(drawn), size).flatten(), minlength=len(law)
            )
            if int((law > 0).sum()) > 1:
                assert chi_square_p_value(counts, law / law.sum()) > FALSE_ALARM
            start = kernel.advance(start, _take(drawn, 0), k)

    def test_chain_ends_clean(self, kernel: Kernel) -> None:
        generator = torch.Generator().manual_seed(2)
        carry = self._init(kernel, (500,), generator)
        for k in range(kernel.num_steps):
            step = kernel.step(carry, k)
            value = step.sample(generator=generator)
            if kernel.capability != SAMPLE_ONLY:
                assert bool((step.log_prob(value) > -torch.inf).all())
            carry = kernel.advance(carry, value, k)
        assert int(carry["tokens"].max()) < kernel.process.vocab_size

    def test_advance_leaves_the_old_carry_alone(self, kernel: Kernel) -> None:
        carry = self._init(kernel, (3,), torch.Generator().manual_seed(5))
        before = {name: value.clone() for name, value in _flat(carry).items()}
        value = kernel.step(carry, 0).sample()
        moved = kernel.advance(carry, value, 0)
        assert torch.equal(moved["tokens"], tokens_of(value))
        assert moved is not carry
        after = _flat(carry)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_rows_do_not_see_each_other(self, kernel: Kernel) -> None:
        require_density(kernel)
        values = self._values(kernel)
        carry = self._start(kernel, tokens_of(values.value))
        for k in range(kernel.num_steps):
            together = kernel.step(carry, k).log_prob(values.value)
            for i in range(0, len(together), 1 + len(together) // 40):
                alone = kernel.step(_take(carry, [i]), k).log_prob(_take(values.value, [i]))
                torch.testing.assert_close(together[[i]], alone, rtol=1e-6, atol=1e-9)

    def test_step_outside_the_grid_is_refused(self, kernel: Kernel) -> None:
        carry = self._init(kernel, (1,), torch.Generator().manual_seed(6))
        for k in (-1, kernel.num_steps):
            with pytest.raises(ValueError, match="step index"):
                kernel.step(carry, k)

    def test_same_as_is_about_the_law(self, kernel: Kernel) -> None:
        assert kernel.same_as(kernel)
        assert kernel.same_as(kernel.with_denoiser(kernel.denoiser))
        assert not kernel.same_as(object())


class _Values(NamedTuple):
    """All that a step can draw, ``(m, ...)``, and weights ``(m,)`` that sum over it."""

    value: Any
    weights: Tensor

    @property
    def column(self) -> Any:
        """The values against a batch of one dimension."""
        return _mapped(self.value, lambda x: x[:, None])

    def total(self, log_p: Tensor) -> Tensor:
        return (log_p.exp() * self.weights[:, None]).sum(0)


def require_density(kernel: Kernel) -> None:
    """Skip the test of a kernel that says that it has no density."""
    if kernel.capability == SAMPLE_ONLY:
        pytest.skip("the kernel does not claim a density")


def _followed(
    kernel: Kernel, carry: Carry, log_p: Tensor, k: int, values: _Values
) -> tuple[Carry, Tensor]:
    """Let every path go wherever it can; log-weights of a quadrature are part of its mass."""
    paths, count = len(log_p), len(values.weights)
    if paths * count > MAX_PATHS:
        raise ValueError(f"{paths * count} paths: give make_kernel fewer steps, tokens or points.")
    moves = kernel.step(carry, k).log_prob(values.column) + values.weights.log()[:, None]
    row, column = torch.arange(paths).repeat(count), torch.arange(count).repeat_interleave(paths)
    grown, reached = _possible(_take(carry, row), (moves + log_p).flatten())
    chosen = (moves + log_p).flatten() > -torch.inf
    return kernel.advance(grown, _take(values.value, column[chosen]), k), reached


def _possible(carry: Carry, log_p: Tensor) -> tuple[Carry, Tensor]:
    keep = log_p > -torch.inf
    return _take(carry, keep), log_p[keep]


def _take(tree: Any, index: Any) -> Any:
    return _mapped(tree, lambda x: x[index])


def _mapped(tree: Any, fn: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _mapped(part, fn) for name, part in tree.items()}
    return fn(tree)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, part in tree.items():
        inner = (
            _flat(part, f"{prefix}{name}/") if isinstance(part, Mapping) else {prefix + name: part}
        )
        flat |= inner
    return flat
