"""Condition reverse chains on some tokens of the clean sequence."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor

from ppl_diffusion.handlers.held import ClampProposal
from ppl_diffusion.handlers.site import ProposedChain, SiteMessenger


def _hold(tokens: Tensor, mask: Tensor, site: ProposedChain, msg: Any) -> ProposedChain:
    clamp = ClampProposal(tokens, mask, site.chain.kernel.process.vocab_size)
    alone = site.with_part(clamp=clamp)  # refuses another length before clamps are merged
    return alone if site.clamp is None else alone.with_part(clamp=site.clamp.merge(clamp))


def clamp(
    fn: Callable[..., Any] | None = None,
    *,
    tokens: Tensor,
    mask: Tensor,
    sites: Collection[str] | None = None,
) -> Any:
    """Observe some tokens of the clean sequences of a program's chains.

    Conditions the model: the target becomes ``p(path | x0[mask] = tokens[mask])`` times the rest
    of the program, and the evidence includes the probability of the tokens. Exact through weights
    (for the absorbing process: the probabilities of the forced tokens when they are revealed).
    Works under plain Pyro inference and inside :func:`~ppl_diffusion.handlers.steer` and
    :class:`ppl_diffusion.inference.SMC`.

    :param fn: a program to wrap; without it, use ``clamp`` as a context manager. Wrap the
        program for ``pyro.infer.Importance``, which blocks all handlers outside of it.
    :param tokens: int64 ``(L,)``, read where ``mask`` is true.
    :param mask: bool ``(L,)``.
    :param sites: names of the chain sites to clamp (all by default).
    :raises ValueError: if tokens and chain do not fit, or no chain site is met.

    Example::

        with clamp(tokens=prior.encode(80 * "T"), mask=torch.arange(80) < 6):
            posterior = SMC(assay, num_particles=256).run(y)
    """
    return SiteMessenger("clamp", partial(_hold, tokens, mask), sites).on(fn)
