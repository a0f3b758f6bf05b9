"""A chain site that is proposed by something else than the chain itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.distributions.memo import remember
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers.conditioned import clean_sequence_of, overwritten, refuse_condition
from ppl_diffusion.handlers.held import ClampProposal, joined
from ppl_diffusion.handlers.steering import Draw, Steering
from ppl_diffusion.smc import Proposal


class ProposedChain(TorchDistribution):
    """A reverse-chain site whose sampler is a proposal with a known weight.

    The proposal has parts, each of them optional, which say the same in whatever order they came:
    steps are twisted, then clamped tokens are held, and with steering a run of particles that move
    so is behind every draw. A clamp also changes the model, to the chain given its tokens.

    One object plays both parts of importance sampling. Where it *drew* its value (the guide),
    ``log_prob`` of that value is the proposal's; where the value was *given* (the replayed model)
    ``log_prob`` is the model's. Model minus guide is the weight, whatever the order of handlers.

    :param chain: the reverse chain.
    :param twist: how steps are proposed, or None.
    :param clamp: tokens to hold, or None.
    :param steering: how the site is steered, or None.
    :raises CapabilityError: if it is twisted or clamped and the chain's steps have no density.
    :raises ValueError: if the chain and the clamp differ in length.

    :ivar draw: what it drew, with a copy of the path, which later edits do not reach, or None.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)

    def __init__(
        self,
        chain: ReverseChain,
        twist: Proposal | None = None,
        clamp: ClampProposal | None = None,
        steering: Steering | None = None,
    ) -> None:
        if not chain.kernel.has_path_density and joined(twist, clamp) is not None:
            raise CapabilityError(
                f"{'clamp' if twist is None else 'twist'}: a proposal needs a kernel with a "
                f"density, {type(chain.kernel).__name__} is {chain.kernel.claim}; condition by a "
                "potential alone (-inf for what is excluded), with run_smc on the bare chain."
            )
        if clamp is not None and len(clamp.mask) != chain.length:
            raise ValueError(
                f"clamp: the chain has {chain.length} positions, the clamp {len(clamp.mask)}."
            )
        if clamp is not None:
            clamp.check_chain(chain.kernel.process)
        self.chain, self.twist, self.clamp, self.steering = chain, twist, clamp, steering
        self.draw: Draw | None = None
        super().__init__(chain.batch_shape, chain.event_shape, validate_args=False)

    def with_part(self, **parts: Any) -> ProposedChain:
        """Return the same site, without its draw, with some parts exchanged.

        :param parts: any of the constructor's arguments.
        """
        names = ("chain", "twist", "clamp", "steering")
        return ProposedChain(**{name: getattr(self, name) for name in names} | parts)

    @constraints.dependent_property(event_dim=2)
    def support(self) -> constraints.Constraint:
        """Paths of states."""
        return self.chain.support

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw paths from the proposal and remember their weights.

        :param sample_shape: leading dimensions.
        """
        shape = torch.Size((*sample_shape, *self.batch_shape))
        chain, moves = self.chain, joined(self.twist, self.clamp)
        propose = _move if self.steering is None else self.steering.propose
        with torch.no_grad():
            path, log_p, log_weight = propose(chain, moves, shape)
        if chain.kernel.declared_parameters() is not None:  # else a gradient may hide there
            remember(path, chain.kernel, log_p, prompt=chain.prompt, given=chain.given)
        self.draw = Draw(path.clone(), log_p, log_weight)
        return path

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the proposal's density of its own draw, or the model's of a given path.

        :param value: int64 ``(*sample, *batch, T + 1, L)``.
        :raises CapabilityError: if this site drew a path and is asked about another one.
        """
        if self.draw is None:
            return self._model_log_prob(value)
        drawn = self.draw.path
        if value.shape != drawn.shape or not bool((value == drawn).all()):
            raise CapabilityError(
                "a proposed chain site knows the density of its own draw only; "
                "score other paths with the chain itself."
            )
        return self.draw.log_q

    def _model_log_prob(self, path: Tensor) -> Tensor:
        log_p = self.chain.log_prob(path)
        if self.clamp is None:
            return log_p
        return torch.where(self.clamp.holds(self.chain.x0(path)), log_p, -torch.inf)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> ProposedChain:
        """Return the site with larger batch dimensions.

        :param batch_shape: the new batch shape.
        """
        return self.with_part(chain=self.chain.expand(torch.Size(batch_shape)))


def _move(chain: ReverseChain, moves: Proposal | None, shape: torch.Size) -> Draw:
    """Draw paths step by step, weighted by ``prod p / q``."""
    kernel: Any = chain.kernel
    carry = chain.start(shape)
    states = [kernel.flat(carry)]
    log_p = kernel.prior_log_prob(kernel.split(states[0]), chain.prompt)
    log_weight = torch.zeros_like(log_p)
    for k in range(kernel.num_steps):
        step = kernel.step(carry, k, fixed=chain.fixed)
        proposal = step if moves is None else moves(step, carry, k)
        value = proposal.sample()
        increment = step.log_prob(value)
        log_p = log_p + increment
        log_weight = log_weight + increment - proposal.log_prob(value)
        carry = kernel.advance(carry, value, k, step=step)
        states.append(kernel.flat(carry))
    return Draw(torch.stack(states, -2), log_p, log_weight)


class SiteMessenger(Messenger):
    """A handler that exchanges chain sites, and says so when it met none.

    :param handler: its name.
    :param exchange: ``(site, msg) -> site``: adds a part, or returns None to leave a site alone.
    :param sites: names of the chain sites, or None for all.
    :param advice: what to do when no site was met.
    """

    def __init__(
        self,
        handler: str,
        exchange: Callable[[ProposedChain, Any], ProposedChain | None],
        sites: Collection[str] | None = None,
        advice: str = "wrap the model itself where the inference blocks outer handlers",
    ) -> None:
        super().__init__()
        self.handler, self.exchange = handler, exchange
        self.sites, self.advice = sites, advice
        self._met = 0
        self._chains: dict[str, tuple[ReverseChain, Tensor]] = {}

    def on(self, fn: Callable[..., Any] | None) -> Any:
        """Return the handled program, or this context manager where there is none."""
        return self if fn is None else self(fn)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or not (self.sites is None or msg["name"] in self.sites):
            return
        site = msg["fn"]
        if isinstance(site, ReverseChain):
            site = ProposedChain(site)  # a proposal of no parts is the chain itself
        found = self.exchange(site, msg) if isinstance(site, ProposedChain) else None
        if found is not None:
            msg["fn"] = found
            self._met += 1

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], ProposedChain):
            self._chains[msg["name"]] = msg["fn"].chain, msg["value"]
        # Without densities (Predictive) a condition is a value for what comes after it.
        computed = None if msg["mask"] is False else overwritten(msg)
        if computed is not None and (chain := clean_sequence_of(computed, self._chains)):
            length = self._chains[chain][0].length
            raise refuse_condition(self.handler, msg["name"], chain, length)

    def __exit__(self, *exc: Any) -> Any:
        met, self._met, self._chains = self._met, 0, {}
        handled = super().__exit__(*exc)  # first of all leave Pyro's handler stack
        if met == 0 and exc[0] is None:
            wanted = "" if self.sites is None else f" named {sorted(self.sites)}"
            raise ValueError(
                f"{self.handler}: no reverse-chain site{wanted} was met; {self.advice}: "
                f"Importance({self.handler}(model, ...))."
            )
        return handled


def log_weight(trace: Trace) -> Tensor:
    """Return the importance weight of one steered or clamped run of a program.

    The sum of the observed sites' log-densities and of the site weights; its exponential is
    unbiased for the program's evidence.

    :param trace: a trace of the program, recorded under :func:`steer` (and :func:`clamp`).
    :returns: a scalar, float64.
    :raises ValueError: if a proposed site did not draw its value.
    """
    trace.compute_log_prob(lambda name, site: site["is_observed"])
    total = torch.zeros((), dtype=torch.float64)  # a scalar goes along with terms of any device
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"]:
            total = total + site["log_prob_sum"]
        elif site["type"] == "sample" and isinstance(site["fn"], ProposedChain):
            draw = site["fn"].draw
            if draw is None:
                raise ValueError(f"log_weight: site {site['name']!r} did not draw its own value.")
            total = total + draw.log_weight.sum()
    return total
