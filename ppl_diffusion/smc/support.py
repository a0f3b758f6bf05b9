"""Can a kernel serve as the proposal of another one? Weights cannot restore what is never drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import DensePrediction
from ppl_diffusion.kernels.base import Kernel
from ppl_diffusion.kernels.interpolating import InterpolatingKernel
from ppl_diffusion.kernels.ordered import OrderedKernel
from ppl_diffusion.kernels.reveal_step import RevealStep
from ppl_diffusion.kernels.step import StepDistribution
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.mixture import three_way

_TINY = 1e-12


def missing_support(model: Kernel, proposal: Kernel) -> str | None:
    """Return why a proposal kernel never makes some move of the model, None if nothing shows.

    Checked are the alphabets, the moves of a site at every step (a Psi schedule may forbid a mask
    to wait, or a token to stay), the numbers of reveals, and filters that cut tokens off. What two
    different networks exclude shows only while they run, see :func:`excluded_token`.

    :param model: the kernel of the chain.
    :param proposal: the kernel that is to propose.
    :returns: the reason, to follow "the proposal ...", or None.
    """
    spaces = [(k.process.num_states, k.process.vocab_size) for k in (model, proposal)]
    if spaces[0] != spaces[1]:
        return f"has {spaces[1][0]} states and {spaces[1][1]} tokens, the chain {spaces[0]}"
    cuts = [getattr(k.denoiser, "excludes_tokens", False) for k in (model, proposal)]
    if cuts[1] and not cuts[0]:
        return "has a filter that excludes tokens (a nucleus) which the chain allows"
    if isinstance(model, OrderedKernel) or isinstance(proposal, OrderedKernel):
        return _other_reveals(model, proposal)
    if isinstance(model, InterpolatingKernel) and isinstance(proposal, InterpolatingKernel):
        return _forbidden_move(model, proposal)
    return None


def _other_reveals(model: Kernel, proposal: Kernel) -> str | None:
    same = isinstance(model, OrderedKernel) and isinstance(proposal, OrderedKernel)
    plans = [(getattr(k, "group_size", None), getattr(k, "block", None)) for k in (model, proposal)]
    if same and plans[0] == plans[1]:
        return None
    return "reveals other numbers of positions per step than the chain, or in other blocks"


def _forbidden_move(model: InterpolatingKernel, proposal: InterpolatingKernel) -> str | None:
    for k in range(model.num_steps):
        for name, (needed, offered) in _moves(model, proposal, k).items():
            if needed > _TINY and offered <= _TINY:
                return f"never lets a {name} at step {k} (kappa = {_lowest(proposal, k):.4g})"
    return None


def _moves(
    model: InterpolatingKernel, proposal: InterpolatingKernel, k: int
) -> dict[str, tuple[float, float]]:
    """Return the least probability of each kind of move, for the model and the proposal."""
    ours, theirs = _site_moves(model, k), _site_moves(proposal, k)
    return {name: (ours[name], theirs[name]) for name in ours}


def _site_moves(kernel: InterpolatingKernel, k: int) -> dict[str, float]:
    a, b = float(kernel.alphas[k]), float(kernel.alphas[k + 1])
    prior = kernel.process.prior
    moves: dict[str, float] = {}
    for pi in np.unique(prior):
        state = "mask" if pi == 1 else "token"
        # A prediction that rules the current state out, and one that is sure of it.
        for c in (0.0,) if pi == 1 else (0.0, 1.0):
            if pi == 0 and (c == 0 or a == 0):  # before any signal there are no such tokens
                continue
            # A kernel that remembers confidences corrects tokens, never masks.
            kappa = 1.0 if pi == 1 and not kernel.markov else _lowest(kernel, k)
            stay, den, renoise = (
                float(w) for w in three_way(a, b, kappa, np.float64(c), np.float64(pi))
            )
            stays = stay + den * c + renoise * pi
            key = f"{state} stay"
            moves[key] = min(moves.get(key, np.inf), stays)
            if pi > 0 and c == 0:
                moves[f"{state} be predicted"] = den
    if not kernel.process.absorbing:
        return moves
    moves["token be masked again"] = (1 - _lowest(kernel, k)) * (1 - b) if a > 0 else 0.0
    return moves


def _lowest(kernel: InterpolatingKernel, k: int) -> float:
    return float(np.min(kernel.kappa[k]))


def excluded_token(model: object, proposal: StepDistribution) -> str | None:
    """Return which token a step of a proposal excludes and the model's step may draw, or None.

    Only tables are compared: a sparse head is never asked for all of its tokens.

    :param model: the step of the chain.
    :param proposal: the step of the proposal, from the same states.
    :returns: the token and its position, to follow "gives", or None.
    """
    if not isinstance(model, TokenStep | RevealStep) or type(model) is not type(proposal):
        return None
    assert isinstance(proposal, TokenStep | RevealStep)
    steps = (model, proposal)
    if not all(isinstance(step.prediction, DensePrediction) for step in steps):
        return None
    missing = (model.log_probs > -torch.inf) & (proposal.log_probs == -torch.inf)
    if not bool(missing.any()):  # nearly always: the rest is dearer
        return None
    missing = missing & _drawable(model) & ~_drawable(proposal)
    if not bool(missing.any()):
        return None
    position, token = missing.flatten(0, -3).any(0).nonzero()[0].tolist()
    return f"token {token} at position {position}"


def _drawable(step: TokenStep | RevealStep) -> Tensor:
    """Return which clean tokens a step may put at each position, bool ``(*batch, L, V)``."""
    size = step.log_probs.shape[-1]
    if isinstance(step, TokenStep):
        return step.dense_log_probs()[..., :size] > -torch.inf
    shown = step.eligible
    if step.order is not None:
        rank = torch.where(shown, step.order, -torch.inf).argsort(-1, descending=True).argsort(-1)
        shown = shown & (rank < step.count)
    return shown[..., None] & (step.log_probs > -torch.inf)
