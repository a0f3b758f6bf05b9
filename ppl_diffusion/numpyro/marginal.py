"""The law of the clean sequence of a reverse chain in NumPyro."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import validate_sample

from ppl_diffusion.arrays import Array
from ppl_diffusion.distributions.marginal import MAX_STATES
from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.kernels.shapes import check_expand
from ppl_diffusion.numpyro.shapes import all_states, enumerated


class ChainMarginal(Distribution):
    """The ``x0``-marginal of a reverse chain, event shape ``(L,)``.

    :param chain: a :class:`~ppl_diffusion.numpyro.ReverseChain` with one prompt, or none.
    """

    pytree_data_fields = ("chain",)
    has_enumerate_support = True

    def __init__(self, chain: Any, *, validate_args: bool | None = None) -> None:
        self.chain = chain
        super().__init__(chain.batch_shape, (chain.length,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of clean tokens."""
        last = self.chain.kernel.process.vocab_size - 1
        return constraints.independent(constraints.integer_interval(0, last), 1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw clean sequences, ``(*sample_shape, *batch, L)``."""
        return self.chain.x0(self.chain.sample(key, sample_shape))

    @validate_sample
    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Return the exact log-probability, by propagating the law of all states.

        :param value: clean tokens, ``(*sample, *batch, L)``.
        :raises IntractableLogProb: if the chain has more than ``MAX_STATES`` sequences, or prompts
            of its own for each element of a batch.
        """
        chain, size = self.chain, self.chain.kernel.process.num_states
        if size**chain.length > MAX_STATES:
            raise IntractableLogProb(
                f"the exact marginal would sum over {size}**{chain.length} states; estimate it "
                "with samples."
            )
        if jnp.ndim(chain.prompt) > 1 and not bool((chain.prompt == chain.prompt[:1]).all()):
            raise IntractableLogProb(
                "log_prob: the exact marginal is computed for one prompt; build a chain for each."
            )
        clean = ((value >= 0) & (value < chain.kernel.process.vocab_size)).all(-1)
        powers = size ** jnp.arange(chain.length - 1, -1, -1)
        index = jnp.where(clean, (value * powers).sum(-1), 0)
        log_p = jnp.where(clean, jnp.log(self._law())[index], -jnp.inf)
        return jnp.broadcast_to(log_p, jnp.broadcast_shapes(log_p.shape, self.batch_shape))

    def _law(self) -> Array:
        """Return the probabilities of all final states, ``(S ** L,)``."""
        chain = self.chain
        prompt = chain.prompt.reshape(-1, chain.length)[0]
        one = chain if chain.prompt.ndim == 1 else type(chain)(chain.kernel, chain.length, prompt)
        states = all_states(chain.kernel.process.num_states, chain.length)
        law = jnp.exp(one.start_log_prob(states))
        for k in range(chain.num_steps):
            step = chain.kernel.step(states, k, fixed=one.fixed)
            law = jnp.exp(step.log_prob(states[:, None])) @ law  # (to, from)
        return law

    def enumerate_support(self, expand: bool = True) -> Array:
        """Return every clean sequence, ``(V ** L, *batch, L)``."""
        return enumerated(self, self.chain.kernel.process.vocab_size, expand, MAX_STATES)

    def expand(self, batch_shape: tuple[int, ...]) -> ChainMarginal:
        """Return the same law with larger batch dimensions (independent copies)."""
        check_expand(self.batch_shape, batch_shape)
        return ChainMarginal(self.chain.expand(batch_shape))
