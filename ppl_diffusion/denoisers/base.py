"""What a denoiser is: a predictor of clean tokens from a noised sequence."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Kind = Literal["cavity", "posterior"]


@runtime_checkable
class Denoiser(Protocol):
    """A callable ``(tokens, t) -> log-probabilities over the clean vocabulary``.

    ``kind`` says what the probabilities mean at a token that is not masked. A ``"cavity"``
    denoiser predicts position ``l`` from all *other* positions, which is what a reverse kernel
    needs and what the NELBO trains; a ``"posterior"`` one also uses the token at ``l`` itself
    (plain cross-entropy training), and kernels convert it. For masks the two coincide.

    ``time_free`` promises that the output does not depend on ``t``, so that it may be reused
    while no token changed.

    ``t`` is a number or a tensor of one time *per row*, ``(*batch,)``: masked chains ask about
    states that are differently far revealed at once. Each row is predicted at its own time,
    ``torch.as_tensor(t).expand(tokens.shape[:-1])`` gives it to every row either way. A denoiser
    that reduced the times to one number would have the right shape and a wrong law: particle
    methods refuse it (:mod:`ppl_diffusion.denoisers.times`), sampling a chain alone would not see
    it, and :class:`ppl_diffusion.testing.DenoiserContract` finds it before either.

    ``conditions`` (optional) names what the output depends on besides states and time, with the
    number of event dimensions of each: ``{"label": 0, "vector": 1}``. The denoiser is then called
    as ``denoiser(tokens, t, label=..., vector=...)``, each ``(*batch, *event)``, and so is its
    ``hidden``.

    Optional attributes are read where they exist: ``hidden``, ``head`` and ``hidden_size`` (a
    sparse vocabulary head), ``changes`` (phrases that say how it departs from its network),
    ``excludes_tokens`` (it cuts off what the network allows), ``network_rows`` (rows that one state
    costs), ``rows_per_call(length)`` (how many rows are fastest at once; many where it is absent)
    and ``num_padding`` (how many of the last tokens only fill sequences up: it reads them, and
    gives them probability zero).

    A denoiser may have a method ``parameters()``, as every ``torch.nn.Module`` has: the tensors its
    output depends on, whose gradients and in-place updates then invalidate what was remembered.
    Chains begin where the first of them lives; a method ``to(device)`` moves them in place.
    """

    vocab_size: int
    kind: Kind
    time_free: bool

    # With Any, a denoiser without conditions need not take them to be one.
    def __call__(self, tokens: Tensor, t: float | Tensor, /, *args: Any, **given: Any) -> Tensor:
        """Return log-probabilities, shape ``(*batch, L, V)``.

        :param tokens: states, int64 ``(*batch, L)``; the mask has id ``V``.
        :param t: time in ``[0, 1]``, a number or one per row, ``(*batch,)``.
        :param given: values of the conditions, if there are any.
        """
        ...


def conditions_of(denoiser: Denoiser) -> Mapping[str, int]:
    """Return what a denoiser reads besides states and time, name by name; mostly nothing."""
    return getattr(denoiser, "conditions", {})


class Wrapper:
    """A denoiser around another one."""

    vocab_size: int
    kind: Kind
    time_free: bool

    def adopt(self, denoiser: Denoiser, *names: str) -> None:
        """Take over what every denoiser says of itself, and what this one says of ``names``."""
        shared = ("vocab_size", "kind", "time_free", "num_padding", "parameters", "to")
        for name in (*shared, *names):
            if hasattr(denoiser, name):  # its absence says something too: unknown is not "none"
                vars(self)[name] = getattr(denoiser, name)


def move(network: object, device: torch.device | str) -> None:
    """Move a denoiser, or what else a kernel asks, in place if it has a method ``to``."""
    to = getattr(network, "to", None)
    if callable(to):
        to(device)
