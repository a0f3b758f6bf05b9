"""What a denoiser must be, and what it must return."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.deferred import refuse_if
from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.processes.base import Process


def check_denoiser(process: Process, denoiser: Denoiser) -> None:
    """Refuse a denoiser that cannot belong to a process.

    :raises CapabilityError: if kind, vocabulary or process do not fit.
    """
    kind = getattr(denoiser, "kind", None)
    if kind not in ("cavity", "posterior"):
        raise CapabilityError(
            f"denoiser.kind must be 'cavity' or 'posterior', got {kind!r}; set it on the denoiser."
        )
    for name in ("vocab_size", "time_free"):
        if not hasattr(denoiser, name):
            raise CapabilityError(f"the denoiser has no attribute {name}; set it on the denoiser.")
    size = denoiser.vocab_size
    if size != process.vocab_size:
        raise CapabilityError(
            f"the denoiser has {size} clean tokens but the process has {process.vocab_size}; "
            "build both with one vocabulary."
        )
    if process.padding is not None and not getattr(denoiser, "num_padding", 0):
        raise CapabilityError(
            f"token {process.padding} only fills sequences up, and {type(denoiser).__name__} may "
            "predict it among the letters; build the network with num_padding=1, or wrap it in "
            "LettersOnly."
        )
    other = getattr(denoiser, "process", None)
    if isinstance(other, Process) and not _same_noise(process, other, denoiser.time_free):
        raise CapabilityError(
            f"the denoiser was built for {other!r} but the kernel runs {process!r}; "
            "build both with one process."
        )


def _same_noise(process: Process, other: Process, time_free: bool) -> bool:
    """Return whether an exact denoiser of one process is right for the other."""
    same_prior = np.array_equal(process.prior, other.prior)
    return same_prior and (time_free or process.schedule == other.schedule)


def clean_log_probs(log_c: Tensor, shape: Sequence[int], vocab_size: int) -> Tensor:
    """Drop mass on the mask (SUBS), insist on finite rows, and normalise them in float64.

    :param log_c: what a denoiser returned for states of ``shape``, with or without a last column
        for the mask.
    :param shape: shape of the states, ``(*batch, L)``, or of gathered rows, ``(n,)``.
    :returns: float64 ``(*shape, V)``.
    :raises TypeError: if the output is no tensor.
    :raises ValueError: if the output has the wrong shape, is NaN or is not normalised.
    """
    log_c = without_mask(log_c, shape, vocab_size).to(torch.float64)
    # float32 rows sum to one only almost: a path of many sites would lose that mass.
    return log_c - log_total(log_c)


def log_total(log_c: Tensor) -> Tensor:
    """Return the log of what rows sum to, which must be nearly nothing.

    :param log_c: ``(*rows, V)``.
    :returns: float64 ``(*rows, 1)``.
    :raises ValueError: if a row is NaN or is not normalised.
    """
    total = log_c.to(torch.float64).exp().sum(-1, keepdim=True)
    require_normalised(deviation(total))
    return total.log()


def without_mask(log_c: Tensor, shape: Sequence[int], vocab_size: int) -> Tensor:
    """Return predictions over the clean tokens alone, in the dtype they come in.

    :param log_c: what a denoiser returned for states of ``shape``.
    :returns: ``(*shape, V)``.
    :raises TypeError: if the output is no tensor.
    :raises ValueError: if it has the wrong shape.
    """
    require_columns(log_c, shape, vocab_size)
    if log_c.shape[-1] > vocab_size:
        log_c = torch.log_softmax(log_c[..., :vocab_size], -1)
    return log_c


def require_columns(log_c: object, shape: Sequence[int], vocab_size: int) -> None:
    """Refuse an output that has no column per clean token, or one more for the mask.

    :param log_c: what a denoiser returned for states of ``shape``.
    :raises TypeError: if it is no tensor.
    :raises ValueError: if it has the wrong shape.
    """
    expected = (*shape, vocab_size)
    require_tensor(log_c, expected)
    found = tuple(log_c.shape)  # type: ignore[attr-defined]
    if found not in (expected, (*shape, vocab_size + 1)):
        raise ValueError(f"the denoiser returned shape {found}, expected {expected}.")


def deviation(total: Tensor) -> Tensor:
    """Return by how much the sums of rows are off one, at most; zero where there are none.

    :param total: of any shape.
    """
    total = total.detach()
    return (total - 1).abs().amax() if total.numel() else total.sum()


def require_normalised(deviation: Tensor) -> None:
    """Refuse predictions whose rows are off one by 1e-3 or more, or NaN.

    :raises ValueError: if they are; at the latest when collected checks are read.
    """
    refuse_if(~(deviation < 1e-3), _unnormalised)


def _unnormalised() -> ValueError:
    return ValueError(
        "the denoiser returned NaN or unnormalised log-probabilities; "
        "apply log_softmax over the clean vocabulary."
    )


def require_rows(output: object, states: Tensor, vocab_size: int, beside: int = 0) -> None:
    """Refuse an output that is not one row per position, ``(*batch, L, anything)``.

    :param beside: number of rows after those, of a latent.
    """
    *batch, length = states.shape
    expected = (*batch, length + beside, vocab_size)
    require_tensor(output, expected)
    shape = tuple(output.shape)  # type: ignore[attr-defined]
    if shape[:-1] != expected[:-1]:
        raise ValueError(f"the denoiser returned shape {shape}, expected {expected}.")


def require_tensor(log_probs: object, expected: tuple[int, ...]) -> None:
    """Refuse what is no tensor, before an operation fails on it with an obscure message."""
    if not isinstance(log_probs, Tensor):
        raise TypeError(
            f"the denoiser returned {type(log_probs).__name__}, expected a torch tensor of "
            f"log-probabilities of shape {expected}."
        )
