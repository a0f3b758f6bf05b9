"""A chain site that is proposed by something else than the chain itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.distributions.memo import remember
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.shapes import check_expand


class Draw(NamedTuple):
    """What a proposed site remembers of its own draw.

    :param path: a copy of the drawn path, which later edits do not reach.
    :param log_q: log-density (or its unbiased estimate) under the proposal.
    :param log_weight: importance weight against the chain.
    """

    path: Tensor
    log_q: Tensor
    log_weight: Tensor


class SiteMessenger(Messenger):
    """A handler that exchanges chain sites, and says so when it met none.

    :param sites: names of the chain sites, or None for all.

    :cvar handler: its name.
    :cvar advice: what to do when no site was met.
    """

    handler: ClassVar[str]
    advice: ClassVar[str] = "wrap the model itself where the inference blocks outer handlers"

    def __init__(self, sites: Collection[str] | None = None) -> None:
        super().__init__()
        self.sites = sites
        self._met = 0

    @abstractmethod
    def _exchanged(self, msg: Any) -> TorchDistribution | None:
        """Return what takes the place of a site, None where the handler has no business."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or not (self.sites is None or msg["name"] in self.sites):
            return
        fn = self._exchanged(msg)
        if fn is not None:
            msg["fn"] = fn
            self._met += 1

    def __exit__(self, *exc: Any) -> Any:
        met, self._met = self._met, 0
        handled = super().__exit__(*exc)  # first of all leave Pyro's handler stack
        if met == 0 and exc[0] is None:
            wanted = "" if self.sites is None else f" named {sorted(self.sites)}"
            raise ValueError(
                f"{self.handler}: no reverse-chain site{wanted} was met; {self.advice}: "
                f"Importance({self.handler}(model, ...))."
            )
        return handled


class ProposedChain(TorchDistribution):
    """A reverse-chain site whose sampler is a proposal with a known weight.

    One object plays both parts of importance sampling. Where it *drew* its value (the guide),
    ``log_prob`` of that value is the proposal's; where the value was *given* (the replayed model)
    ``log_prob`` is the model's. Model minus guide is the weight, whatever the order of handlers.

    :param chain: the reverse chain.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)

    def __init__(self, chain: ReverseChain) -> None:
        self.chain = chain
        self.draw: Draw | None = None
        super().__init__(chain.batch_shape, chain.event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Constraint:
        """Paths of states."""
        return self.chain.support

    @abstractmethod
    def _propose(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Return paths ``(*shape, T + 1, L)``, their model log-density, and their log-weight."""

    @abstractmethod
    def _with_chain(self, chain: ReverseChain) -> Self:
        """Return the same kind of site around another chain."""

    def _model_log_prob(self, path: Tensor) -> Tensor:
        """Return the density the model gives a path that came from elsewhere."""
        return self.chain.log_prob(path)

    def x0(self, path: Tensor) -> Tensor:
        """Return the clean sequence of a path, ``(*batch, L)``.

        :param path: ``(*batch, T + 1, L)``.
        """
        return self.chain.x0(path)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw paths from the proposal and remember their weights.

        :param sample_shape: leading dimensions.
        """
        shape = torch.Size((*sample_shape, *self.batch_shape))
        path, log_p, log_weight = self._propose(shape)
        if self.chain.kernel.declared_parameters() is not None:  # else a gradient may hide there
            remember(path, self.chain.kernel, log_p, prompt=self.chain.prompt)
        self.draw = Draw(path.clone(), log_p - log_weight, log_weight)
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

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Self:
        """Return the site with larger batch dimensions.

        :param batch_shape: the new batch shape.
        """
        return self._with_chain(self.chain.expand(check_expand(self.batch_shape, batch_shape)))
