"""One time per row: a denoiser that reads one number out of them would be right in shape only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.prediction import prefers_head

PROBED = (0.1, 0.9)
"""Times at which a network is asked about one state, together and alone."""

MOST_PROBES = 8
"""States that are asked about before a network is believed not to read the time."""


def require_time_per_row(
    denoiser: Denoiser, tokens: Tensor, t: Tensor, given: Mapping[str, Tensor]
) -> bool:
    """Refuse a denoiser that reduces the times of its rows to one number.

    Its outputs have the right shape and the wrong law, which nothing later can see. So it is asked
    about one state at two times, together and alone. That is four rows, which are not counted as a
    cost of the method.

    :param tokens: states of the call that is about to be made, int64 ``(*batch, L)``.
    :param t: its times, more than one.
    :param given: its conditions, each ``(*batch, *event)``.
    :returns: whether the question is settled; it is not where the state did not show the time.
    :raises ValueError: if rows at two times are not what they are alone, or cannot be asked for.
    """
    batch = tokens.ndim - 1
    state = tokens.flatten(0, -2)[t.flatten().argmax()]  # the most masked: it has most to predict
    state = state.reshape(*[1] * batch, -1)
    one = {
        n: x.flatten(0, batch - 1)[:1].reshape(*[1] * batch, *x.shape[batch:])
        for n, x in given.items()
    }
    alone = [_output(denoiser, state, time, one) for time in PROBED]
    if getattr(denoiser, "training", False):
        again = _output(denoiser, state, PROBED[0], one)
        if again is None or alone[0] is None or not torch.equal(again, alone[0]):
            return True  # with dropout no two calls agree, and nothing can be said
    times = torch.tensor(PROBED, dtype=t.dtype, device=t.device).reshape(2, *[1] * (batch - 1))
    both = {n: torch.cat([x, x]) for n, x in one.items()}
    try:
        together = _output(denoiser, torch.cat([state, state]), times, both)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise ValueError(_refusal(denoiser, times, f"failed ({failure})")) from failure
    if together is None or alone[0] is None or alone[1] is None:
        return True  # what is no table at all is named where it is used
    difference = float((alone[0] - alone[1]).abs().max())
    error = float((together - torch.cat([*alone])).abs().max())  # type: ignore[list-item]
    # Whatever number they are reduced to, one of the two rows is off by half the difference.
    floor = torch.finfo(together.dtype).eps ** 0.5 * max(1.0, float(together.abs().max()))
    if difference > floor and error >= 0.4 * difference:
        raise ValueError(_refusal(denoiser, times, "answers as if all rows had the same"))
    return difference > floor


def _refusal(denoiser: Denoiser, times: Tensor, what: str) -> str:
    return (
        f"the denoiser {type(denoiser).__name__} was given one time per row, t of shape "
        f"{tuple(times.shape)}, and {what}; read t row by row "
        "(for instance torch.as_tensor(t).expand(tokens.shape[:-1])), or promise time_free."
    )


def _output(
    denoiser: Any, tokens: Tensor, t: float | Tensor, given: Mapping[str, Tensor]
) -> Tensor | None:
    with torch.no_grad():
        sparse = prefers_head(denoiser)
        output = (denoiser.hidden if sparse else denoiser)(tokens, t, **given)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    return output if sparse else output.exp()
