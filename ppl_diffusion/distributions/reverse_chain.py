"""A whole reverse chain as one Pyro distribution: its value is the path, noisiest state first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.distributions._shapes import check_expand, check_value, enumerated
from ppl_diffusion.distributions.marginal import ChainMarginal
from ppl_diffusion.distributions.token_step import MAX_ENUMERATE
from ppl_diffusion.kernels.interpolating import InterpolatingKernel

_MEMO = "_ppl_diffusion_path"


class ReverseChain(TorchDistribution):
    """The law of a reverse path, event shape ``(T + 1, L)``.

    ``log_prob`` is exact and normalised: prior of the noisiest state times ``T`` factorised
    steps. The clean sequence is :meth:`x0`; its law is another object, :meth:`marginal`.
    A sampled path remembers its log-probability (on the tensor, as the sampled tensor is what
    Pyro passes around), so that sampling and scoring cost ``T`` network calls together, also
    under ``pyro.plate``, replay and ``Importance``. Indexing or editing the tensor forgets it.

    :param kernel: the reverse kernel.
    :param length: number ``L`` of positions.
    :param prompt: int64 ``(L,)``: tokens present from the start, -1 where the chain is free.
        This defines the chain that is started from the prompt; to condition a chain on tokens
        of ``x0`` use :func:`ppl_diffusion.handlers.clamp`.
    :raises ValueError: if the length or the prompt does not fit.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_enumerate_support = True

    def __init__(
        self,
        kernel: InterpolatingKernel,
        length: int,
        *,
        prompt: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if length < 1:
            raise ValueError(f"ReverseChain: length must be >= 1, got {length}.")
        self.kernel, self.length = kernel, int(length)
        self.prompt = None if prompt is None else _check_prompt(prompt, length, kernel)
        event_shape = torch.Size((kernel.num_steps + 1, self.length))
        super().__init__(torch.Size(), event_shape, validate_args=validate_args)

    @property
    def num_steps(self) -> int:
        """Number ``T`` of reverse steps."""
        return self.kernel.num_steps

    @property
    def fixed(self) -> Tensor | None:
        """Prompt positions, bool ``(L,)``, or None."""
        return None if self.prompt is None else self.prompt >= 0

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Constraint:
        """Paths of states."""
        last = self.kernel.process.num_states - 1
        return constraints.independent(constraints.integer_interval(0, last), 2)

    def x0(self, path: Tensor) -> Tensor:
        """Return the clean sequence of a path.

        :param path: ``(*batch, T + 1, L)``.
        :returns: ``(*batch, L)``.
        """
        return path[..., -1, :]

    def marginal(self) -> ChainMarginal:
        """Return the law of the clean sequence, as a distribution of its own."""
        return ChainMarginal(self)

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw paths, with ``T`` network calls.

        :param sample_shape: leading dimensions.
        :param generator: source of randomness (the global one by default).
        :returns: int64 ``(*sample_shape, *batch, T + 1, L)``.
        """
        kernel, shape = self.kernel, (*sample_shape, *self.batch_shape)
        with torch.no_grad():
            carry = kernel.init_carry(shape, self.length, prompt=self.prompt, generator=generator)
            log_p = kernel.prior_log_prob(carry["tokens"], self.prompt)
            states = [carry["tokens"]]
            for k in range(kernel.num_steps):
                step = kernel.step(carry, k, fixed=self.fixed)
                tokens = step.sample(generator=generator)
                log_p = log_p + step.log_prob(tokens)
                carry = kernel.advance(carry, tokens, k)
                states.append(tokens)
        path = torch.stack(states, -2)
        remember(path, kernel, log_p, prompt=self.prompt)
        return path

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log-probability of paths, with at most ``T`` network calls.

        :param value: int64 ``(*sample, *batch, T + 1, L)``.
        :returns: float64, the broadcast batch shape; ``-inf`` for impossible paths.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_p = recall(value, self.kernel, prompt=self.prompt)
        if log_p is None:
            log_p = self._path_log_prob(check_value(self, value))
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def _path_log_prob(self, path: Tensor) -> Tensor:
        states = path.unbind(-2)
        log_p = self.kernel.prior_log_prob(states[0], self.prompt)
        carry = {"tokens": states[0]}
        for k, tokens in enumerate(states[1:]):
            log_p = log_p + self.kernel.step(carry, k, fixed=self.fixed).log_prob(tokens)
            carry = self.kernel.advance(carry, tokens, k)
        return log_p

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all paths, ``(S ** (L (T + 1)), *batch, T + 1, L)``, for tiny chains.

        :param expand: whether to expand the batch dimensions (size one otherwise).
        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        return enumerated(self, self.kernel.process.num_states, expand, MAX_ENUMERATE)

    def expand(
        self, batch_shape: Sequence[int], _instance: ReverseChain | None = None
    ) -> ReverseChain:
        """Return the same chain with larger batch dimensions (independent copies).

        :param batch_shape: the new batch shape.
        """
        new = self._get_checked_instance(ReverseChain, _instance)
        shape = check_expand(self.batch_shape, batch_shape)
        new.kernel, new.length, new.prompt = self.kernel, self.length, self.prompt
        super(ReverseChain, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @classmethod
    def infer_shapes(
        cls, kernel: object = (), length: object = (), prompt: object = ()
    ) -> tuple[torch.Size, torch.Size]:
        """Return ``(batch_shape, event_shape)``.

        The event shape is a property of the kernel object and of the number ``length``, not of
        any array's shape, so both must be passed themselves.

        :param kernel: the kernel.
        :param length: the number of positions.
        :raises NotImplementedError: if only shapes are given.
        """
        if not isinstance(kernel, InterpolatingKernel) or not isinstance(length, int):
            raise NotImplementedError(
                "ReverseChain.infer_shapes needs the kernel and the length themselves; "
                "the shape of a path does not follow from array shapes."
            )
        return torch.Size(), torch.Size((kernel.num_steps + 1, length))

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"ReverseChain({self.kernel!r}, {shapes})"


def remember(
    path: Tensor, kernel: InterpolatingKernel, log_p: Tensor, *, prompt: Tensor | None = None
) -> None:
    """Attach a path's log-probability to the tensor itself.

    :param path: the sampled path.
    :param kernel: the kernel it was sampled from.
    :param log_p: its log-probability.
    :param prompt: the prompt of the chain.
    """
    setattr(path, _MEMO, (kernel, prompt, path._version, _parameter_version(kernel), log_p))


def recall(
    path: Tensor, kernel: InterpolatingKernel, *, prompt: Tensor | None = None
) -> Tensor | None:
    """Return the remembered log-probability where it is still valid, else None.

    It is not where the path was edited, the kernel or the prompt is another one, a parameter of
    the network moved, or a gradient is wanted (the memo was computed without one).

    :param path: a path.
    :param kernel: the kernel that is to score it.
    :param prompt: the prompt of the chain that is to score it.
    """
    memo = getattr(path, _MEMO, None)
    if memo is None:
        return None
    owner, owner_prompt, version, parameters, log_p = memo
    if not owner.same_as(kernel) or version != path._version:
        return None
    if not _same_prompt(owner_prompt, prompt):
        return None
    if parameters != _parameter_version(kernel):
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in _parameters(kernel)):
        return None
    return log_p


def _same_prompt(here: Tensor | None, there: Tensor | None) -> bool:
    if here is None or there is None:
        return here is there
    return torch.equal(here, there)


def _parameters(kernel: InterpolatingKernel) -> list[Tensor]:
    parameters = getattr(kernel.denoiser, "parameters", None)
    return list(parameters()) if callable(parameters) else []


def _parameter_version(kernel: InterpolatingKernel) -> int:
    return sum(p._version for p in _parameters(kernel))


def _check_prompt(prompt: Tensor, length: int, kernel: InterpolatingKernel) -> Tensor:
    prompt = torch.as_tensor(prompt, dtype=torch.int64)
    if tuple(prompt.shape) != (length,):
        raise ValueError(
            f"ReverseChain: prompt must have shape ({length},), got {tuple(prompt.shape)}."
        )
    if int(prompt.max()) >= kernel.process.vocab_size or int(prompt.min()) < -1:
        raise ValueError("ReverseChain: prompt must hold clean token ids, and -1 where it is free.")
    return prompt
