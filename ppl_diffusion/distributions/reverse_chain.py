"""A whole reverse chain as one Pyro distribution: its value is the path, noisiest state first."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.distributions.marginal import ChainMarginal
from ppl_diffusion.distributions.memo import declares_gradient, recall, remember
from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.kernels.base import Carry, Kernel, SampledPath, check_given
from ppl_diffusion.kernels.blocks import TOKENS, BlockSpec, Value, are_discrete, tokens_of
from ppl_diffusion.kernels.shapes import check_expand, check_value, enumerated
from ppl_diffusion.kernels.step import MAX_ENUMERATE
from ppl_diffusion.processes.base import whole_number


class ReverseChain(TorchDistribution):
    """The law of a reverse path, event shape ``(T + 1, L)``.

    Where a kernel draws latents beside the tokens (``kernel.blocks``), the value packs both: its
    rows hold the tokens first and then the blocks, ``(T + 1, W)``, whole numbers or float64.
    :meth:`x0` and :meth:`block` take it apart.

    ``log_prob`` is exact and normalised: prior of the noisiest state times ``T`` factorised
    steps. The clean sequence is :meth:`x0`; its law is another object, :meth:`marginal`.
    The log-probability of a sampled path is remembered with the tensor object (which is what Pyro
    passes around), so that sampling and scoring cost ``T`` network calls together, also under
    ``pyro.plate``, replay and ``Importance``. It is forgotten when the path is indexed, copied or
    edited or when a tensor of ``denoiser.parameters()`` moves, and not used where a gradient is
    wanted. Edits that torch does not see (through ``.data``), and edits of what a denoiser reads
    without a gradient and without naming it in ``parameters()``, are invisible to it.

    :param kernel: the reverse kernel.
    :param prompt: int64 ``(L,)``, or ``(*batch, L)`` for a batch of chains with prompts of their
        own: tokens present from the start, -1 where the chain is free.
        This defines the chain that is started from the prompt; to condition a chain on tokens
        of ``x0`` use :func:`ppl_diffusion.handlers.clamp`.
    :param given: what the denoiser's ``conditions`` are, each ``(*batch, *event)``: the chain is a
        conditional law, and its batch is the common one of prompt and conditions.
    :raises TypeError: if the length or the prompt is not of whole numbers.
    :raises ValueError: if the length, the prompt or the conditions do not fit.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_enumerate_support = True

    def __init__(
        self,
        kernel: Kernel,
        length: int,
        *,
        prompt: Tensor | None = None,
        given: Mapping[str, Any] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.kernel, self.length = kernel, whole_number(length, "ReverseChain: length")
        kernel.check_length(self.length)
        self.prompt = None if prompt is None else _check_prompt(prompt, self.length, kernel)
        self.given = {
            name: value
            if isinstance(value, Tensor)
            else torch.as_tensor(value, device=kernel.device)
            for name, value in (given or {}).items()
        }
        check_given(kernel, self.given, "ReverseChain")
        batch_shape = self._common_batch()
        self.given = kernel.expand_given(self.given, batch_shape)
        event_shape = torch.Size((kernel.num_steps + 1, kernel.width(self.length)))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def _common_batch(self) -> torch.Size:
        shapes = [] if self.prompt is None else [self.prompt.shape[:-1]]
        for name, value in self.given.items():
            shapes.append(value.shape[: value.ndim - self.kernel.conditions[name]])
        try:
            return torch.Size(torch.broadcast_shapes(*shapes))
        except RuntimeError as error:
            raise ValueError(
                f"ReverseChain: the batch shapes of prompt and conditions, "
                f"{[tuple(shape) for shape in shapes]}, do not broadcast; give them one batch."
            ) from error

    @property
    def num_steps(self) -> int:
        """Number ``T`` of reverse steps."""
        return self.kernel.num_steps

    @property
    def num_free(self) -> int:
        """Number of positions without a prompt, the largest of the batch."""
        return self.length if self.prompt is None else int((self.prompt < 0).sum(-1).max())

    @property
    def fixed(self) -> Tensor | None:
        """Prompt positions, bool ``(L,)`` or ``(*batch, L)``, or None."""
        return None if self.prompt is None else self.prompt >= 0

    @constraints.dependent_property(event_dim=2)
    def support(self) -> constraints.Constraint:
        """Paths of states."""
        last = self.kernel.process.num_states - 1
        tokens, blocks = constraints.integer_interval(0, last), self.kernel.blocks
        if not blocks:
            return constraints.independent(tokens, 2)
        beside = [_entries(spec) for spec in blocks.values()]
        lengths = [self.length, *(spec.size for spec in blocks.values())]
        return constraints.independent(constraints.cat([tokens, *beside], -1, lengths), 2)

    def x0(self, path: Tensor) -> Tensor:
        """Return the clean sequence of a path.

        :param path: ``(*batch, T + 1, L)``, or ``(*batch, T + 1, W)``.
        :returns: int64 ``(*batch, L)``.
        :raises ValueError: if it is no path.
        """
        self._require_path(path)
        return tokens_of(self.kernel.split(path[..., -1, :]))

    def block(self, path: Tensor, name: str = "latent", k: int = -1) -> Tensor:
        """Return a block of a path that was drawn beside the tokens.

        :param path: ``(*batch, T + 1, W)``.
        :param name: a name of ``kernel.blocks``.
        :param k: number of steps taken, 0 (noisiest) to ``T``; by default the finished block.
        :returns: ``(*batch, *event)``.
        :raises ValueError: if it is no path, or there is no such block.
        """
        self._require_path(path)
        if name not in self.kernel.blocks:
            raise ValueError(
                f"block: the chain draws {', '.join(self.kernel.blocks) or 'nothing'} beside its "
                f"tokens, and no {name!r}."
            )
        value = self.kernel.split(path[..., k, :])
        assert not isinstance(value, Tensor)
        return value[name]

    def latent(self, path: Tensor, k: int = -1) -> Tensor:
        """Return the latent of a path, see :meth:`block`.

        :param path: ``(*batch, T + 1, W)``.
        :param k: number of steps taken; by default the finished latent.
        """
        return self.block(path, "latent", k)

    def tokens(self, states: Tensor) -> Tensor:
        """Return the tokens of states or paths, int64 ``(..., L)``.

        :param states: ``(..., L)``, or ``(..., W)`` with blocks.
        """
        return tokens_of(self.kernel.split(states))

    def _require_path(self, path: Tensor) -> None:
        if path.shape[-2:] != self.event_shape:
            raise ValueError(
                f"x0: expected a path (*batch, {', '.join(map(str, self.event_shape))}), got shape "
                f"{tuple(path.shape)}; a chain is conditioned on tokens of its clean sequence by "
                "ppl_diffusion.handlers.clamp."
            )

    def marginal(self) -> ChainMarginal:
        """Return the law of the clean sequence, as a distribution of its own."""
        return ChainMarginal(self)

    def start(self, batch_shape: Sequence[int], generator: torch.Generator | None = None) -> Carry:
        """Return the carry of a noisiest state, with the chain's prompt and conditions.

        :param batch_shape: all leading dimensions, those of the chain last.
        """
        return self.kernel.init_carry(
            batch_shape, self.length, prompt=self.prompt, generator=generator, given=self.given
        )

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw paths, with ``T`` network calls.

        :returns: int64 ``(*sample_shape, *batch, T + 1, L)``; ``(..., T + 1, W)`` with blocks, in
            float64 where one is continuous.
        """
        shape = torch.Size((*sample_shape, *self.batch_shape))
        # A gradient that parameters() does not name shows in the output of the first network call.
        probe = not declares_gradient(self.kernel)
        with torch.no_grad():
            drawn = self.kernel.sample_path(
                shape, self.length, generator=generator, probe=probe, **self._known
            ) or self._sample_steps(shape, generator, probe)
        if drawn.log_prob is not None and not drawn.hidden_gradient:
            remember(drawn.path, self.kernel, drawn.log_prob, **self._known)
        return drawn.path

    def _sample_steps(
        self, shape: torch.Size, generator: torch.Generator | None, probe: bool
    ) -> SampledPath:
        kernel, hidden = self.kernel, False
        carry = self.start(shape, generator)
        log_p: Tensor | None = None
        if kernel.has_path_density:
            log_p = kernel.prior_log_prob(self._begun(carry), self.prompt)
        states = [kernel.flat(carry)]
        for k in range(kernel.num_steps):
            with torch.set_grad_enabled(probe):
                step = kernel.step(carry, k, fixed=self.fixed)
            value = step.sample(generator=generator)
            if log_p is not None:
                log_p = log_p + step.log_prob(value).detach()
            hidden = hidden or (probe and getattr(step, "wants_gradient", False))
            probe = probe and not kernel.asks_denoiser(carry, k)
            carry = kernel.advance(carry, value, k, step=step)
            states.append(kernel.flat(carry))
        return SampledPath(torch.stack(states, -2), log_p, hidden)

    def _begun(self, carry: Carry) -> Value:
        blocks = {name: carry[name] for name in self.kernel.blocks}
        return {TOKENS: carry[TOKENS], **blocks} if blocks else carry[TOKENS]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log-probability of paths, with at most ``T`` network calls.

        :param value: int64 ``(*sample, *batch, T + 1, L)``, with blocks ``(..., T + 1, W)``.
        :returns: float64, the broadcast batch shape; ``-inf`` for impossible paths.
        :raises IntractableLogProb: if the kernel has no density.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_p = recall(value, self.kernel, **self._known)
        if log_p is None:
            exact = are_discrete(self.kernel.blocks)
            log_p = self._path_log_prob(check_value(self, value, whole=exact))
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    @property
    def _known(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "given": self.given}

    def _path_log_prob(self, path: Tensor) -> Tensor:
        if self.given:  # one condition per row, so there must be as many rows
            batch = torch.broadcast_shapes(path.shape[:-2], self.batch_shape)
            path = path.expand(*batch, -1, -1)
        whole = self.kernel.path_log_prob(path, **self._known)
        if whole is not None:
            return whole
        if not self.kernel.has_path_density:
            raise IntractableLogProb(
                f"log_prob: the density of a path of {type(self.kernel).__name__} is not known; "
                "use run_smc, which needs none."
            )
        start, *values = [self.kernel.split(state) for state in path.unbind(-2)]
        log_p = self.kernel.prior_log_prob(start, self.prompt)
        carry = self.kernel.resume(start, self.given)
        for k, value in enumerate(values):
            step = self.kernel.step(carry, k, fixed=self.fixed)
            log_p = log_p + step.log_prob(value)
            carry = self.kernel.advance(carry, value, k, step=step)
        return log_p

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all paths, ``(S ** (L (T + 1)), *batch, T + 1, L)``, for tiny chains.

        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``, or a block is
            continuous.
        """
        kernel, beside = self.kernel, self.kernel.blocks.values()
        sizes = [kernel.process.num_states] * self.length
        for spec in beside:
            if spec.num_states is None:
                raise NotImplementedError(
                    f"ReverseChain: {type(kernel).__name__} draws continuous latents beside the "
                    "tokens; use sampling-based inference."
                )
            sizes += [spec.num_states] * spec.size
        return enumerated(self, sizes, expand, MAX_ENUMERATE, kernel.device)

    def expand(
        self, batch_shape: Sequence[int], _instance: ReverseChain | None = None
    ) -> ReverseChain:
        """Return the same chain with larger batch dimensions (independent copies)."""
        new = self._get_checked_instance(ReverseChain, _instance)
        shape = check_expand(self.batch_shape, batch_shape)
        new.kernel, new.length, new.prompt = self.kernel, self.length, self.prompt
        if new.prompt is not None and new.prompt.ndim > 1:
            new.prompt = new.prompt.expand(*shape, -1)
        new.given = self.kernel.expand_given(self.given, shape)
        super(ReverseChain, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def to(self, device: torch.device | str) -> ReverseChain:
        """Return the chain on a device; its network is moved in place, as modules do."""
        moved = copy.copy(self)
        moved.kernel = self.kernel.to(device)
        moved.prompt = None if self.prompt is None else self.prompt.to(device)
        moved.given = {name: value.to(device) for name, value in self.given.items()}
        return moved

    @classmethod
    def infer_shapes(
        cls,
        kernel: object = (),
        length: object = (),
        prompt: object = (),
        given: Mapping[str, Tensor] | None = None,
    ) -> tuple[torch.Size, torch.Size]:
        """Return ``(batch_shape, event_shape)``; a batch of prompts must be a tensor.

        The event shape is a property of the kernel object and of the number ``length``, not of
        any array's shape, so both must be passed themselves.

        :raises NotImplementedError: if only shapes are given.
        """
        if not isinstance(kernel, Kernel) or not isinstance(length, int):
            raise NotImplementedError(
                "ReverseChain.infer_shapes needs the kernel and the length themselves; "
                "the shape of a path does not follow from array shapes."
            )
        batch = prompt.shape[:-1] if isinstance(prompt, Tensor) else torch.Size()
        for name, value in (given or {}).items():
            own = value.shape[: value.ndim - kernel.conditions[name]]
            batch = torch.Size(torch.broadcast_shapes(batch, own))
        return batch, torch.Size((kernel.num_steps + 1, kernel.width(length)))

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"ReverseChain({self.kernel!r}, {shapes})"


def _entries(spec: BlockSpec) -> constraints.Constraint:
    if spec.num_states is None:
        return constraints.real
    return constraints.integer_interval(0, spec.num_states - 1)


def _check_prompt(prompt: Tensor, length: int, kernel: Kernel) -> Tensor:
    if not isinstance(prompt, Tensor):
        prompt = torch.as_tensor(prompt, device=kernel.device)
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise TypeError(f"ReverseChain: prompt must hold integer ids, got {prompt.dtype}.")
    prompt = prompt.to(torch.int64)
    if prompt.ndim == 0 or prompt.shape[-1] != length or prompt.numel() == 0:
        raise ValueError(
            f"ReverseChain: prompt must have shape ({length},) or (*batch, {length}), "
            f"got {tuple(prompt.shape)}."
        )
    if int(prompt.max()) >= kernel.process.vocab_size or int(prompt.min()) < -1:
        raise ValueError("ReverseChain: prompt must hold clean token ids, and -1 where it is free.")
    return prompt
