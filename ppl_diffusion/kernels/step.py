"""What the distributions of one reverse step share: the next state given the current one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.denoisers.prediction import DensePrediction, Prediction
from ppl_diffusion.kernels.shapes import check_expand, check_value, enumerated
from ppl_diffusion.processes.noise import uniforms

MAX_ENUMERATE = 2**16
"""Largest support that ``enumerate_support`` will build."""


class StepDistribution(TorchDistribution):
    """The law of the next state, event shape ``(L,)``; values are state ids.

    Positions in ``fixed`` keep their token with probability one and contribute nothing to the
    density. Subclasses set ``tokens``, ``fixed`` and ``num_states`` before ``super().__init__``.

    :ivar tokens: current states, int64 ``(*batch, L)``.
    :ivar fixed: bool ``(*batch, L)`` or None.
    :ivar num_states: number ``S`` of states of a site.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_enumerate_support = True
    num_uniforms: ClassVar[int] = 2
    """How many uniforms per site :meth:`draw` takes."""

    tokens: Tensor
    fixed: Tensor | None
    num_states: int

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of states."""
        return constraints.independent(constraints.integer_interval(0, self.num_states - 1), 1)

    @abstractmethod
    def draw(self, *noise: Tensor) -> Tensor:
        """Turn uniforms into next states; the same uniforms give the same states.

        :param noise: ``num_uniforms`` arrays of numbers in ``[0, 1)``, ``(*sample, *batch, L)``.
        """

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw next states.

        :returns: int64 ``(*sample_shape, *batch, L)``.
        """
        shape = (self.num_uniforms, *sample_shape, *self.batch_shape, *self.event_shape)
        device = self.tokens.device
        noise = uniforms(shape, generator=generator, device=device)
        with torch.no_grad():
            return self.draw(*noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log-probability of a next state.

        :param value: states, int64 ``(*sample, *batch, L)``.
        :returns: float64, the broadcast batch shape; ``-inf`` for impossible moves.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = check_value(self, value)
        return self._score(*torch.broadcast_tensors(self.tokens, value))

    def _score(self, tokens: Tensor, value: Tensor) -> Tensor:
        site = self._site_log_probs(tokens, value)
        if self.fixed is not None:
            kept = torch.where(value == tokens, 0.0, -torch.inf).to(site.dtype)
            site = torch.where(self.fixed, kept, site)
        return site.sum(-1)

    def _site_log_probs(self, tokens: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def wants_gradient(self) -> bool:
        """Whether the prediction behind this step depends on a tensor that requires a gradient."""
        law = getattr(self, "prediction", getattr(self, "log_probs", None))
        return bool(getattr(law, "requires_grad", False))

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with larger batch dimensions."""
        new: Self = self._get_checked_instance(type(self), _instance)
        shape, old = check_expand(self.batch_shape, batch_shape), len(self.batch_shape)
        # Every tensor of a step begins with the batch; the rest belongs to all rows alike.
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = value.expand(*shape, *value.shape[old:])
            elif isinstance(value, Prediction):
                value = value.expand(shape)
            new.__dict__[name] = value
        super(StepDistribution, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @classmethod
    def infer_shapes(cls, *args: Any, **kwargs: Any) -> tuple[torch.Size, torch.Size]:
        """Return ``(batch_shape, event_shape)`` from the shapes of the constructor's arguments."""
        # By position too where the constructor wants names: Pyro passes shapes in their order.
        named = dict(zip(signature(cls).parameters, args, strict=False)) | kwargs
        tokens, log_probs = (tuple(named.get(name, ())) for name in ("tokens", "log_probs"))
        batch = broadcast_shape(tokens[:-1], log_probs[:-2])
        return torch.Size(batch), torch.Size(tokens[-1:])

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all sequences of states, ``(S ** L, *batch, L)``.

        :param expand: whether to expand the batch dimensions (size one otherwise).
        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        return enumerated(self, self.num_states, expand, MAX_ENUMERATE, self.tokens.device)


def check_states(step: StepDistribution) -> None:
    """Refuse current states that are none."""
    tokens = step.tokens
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < step.num_states:
        raise ValueError(
            f"{type(step).__name__}: tokens must be states 0..{step.num_states - 1}, got "
            f"{int(tokens.min())}..{int(tokens.max())}."
        )


def check_normalised(step: StepDistribution, prediction: Prediction) -> None:
    """Refuse a table of predictions whose rows are no distributions."""
    if not isinstance(prediction, DensePrediction) or prediction.log_probs.numel() == 0:
        return
    total = prediction.log_probs.detach().to(torch.float64).exp().sum(-1)
    if not bool(((total - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"{type(step).__name__}: log_probs must hold normalised log-probabilities, but a row "
            "has another sum or a NaN; apply log_softmax."
        )
