"""Propose reverse chains by tilted predictions, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers.proposals import LogitsFn, LogitsProposal
from ppl_diffusion.handlers.site import ProposedChain, SiteMessenger
from ppl_diffusion.smc import Proposal


def _twist(moves: Proposal, site: ProposedChain, msg: Any) -> ProposedChain:
    if site.twist is not None:
        raise CapabilityError(
            f"twist: the site {msg['name']!r} is twisted already, and a particle moves one "
            "way only; join both into one proposal."
        )
    return site.with_part(twist=moves)


def twist(
    fn: Callable[..., Any] | None = None,
    *,
    logits: LogitsFn | None = None,
    proposal: Proposal | None = None,
    sites: Collection[str] | None = None,
) -> Any:
    """Propose each reverse-chain site by twisted steps.

    The joint density of the program is unchanged: a site is drawn step by step from
    ``q ∝ p exp(psi)`` and carries the weight ``prod p / q``. Any finite ``psi`` is valid and a bad
    one only adds variance. With a :func:`~ppl_diffusion.handlers.steer` around it or inside of it
    the particles of every run move by the twist. So do those of
    :class:`ppl_diffusion.inference.SMC`; methods that move their own way refuse a twist.

    :param fn: a program to wrap; without it, use ``twist`` as a context manager. Wrap the
        program for ``pyro.infer.Importance``, which blocks all handlers outside of it.
    :param logits: ``(carry, log_probs, k) -> psi (*batch, L, V)``, see :class:`LogitsProposal`.
    :param proposal: or a proposal, such as :class:`GradientProposal`.
    :param sites: names of the chain sites (all by default).
    :raises TypeError: if not exactly one of ``logits`` and ``proposal`` is given.
    :raises CapabilityError: if the steps of a chain have no density or show no prediction, or a
        site is twisted already.
    :raises ValueError: if no chain site is met.

    Example::

        guided = twist(assay, proposal=GradientProposal(soft_strength))
        posterior = pyro.infer.Importance(guided, num_samples=100).run(y)
    """
    if (logits is None) == (proposal is None):
        raise TypeError("twist: give exactly one of logits and proposal.")
    moves = LogitsProposal(logits) if logits is not None else proposal
    assert moves is not None
    return SiteMessenger("twist", partial(_twist, moves), sites).on(fn)
