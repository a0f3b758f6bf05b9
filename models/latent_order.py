"""How the order of the tokens is learned for a network that stays as it is, and kept in a folder.

The codes being known, masks with probabilities of their own are learned noise (FLDD, arXiv
2605.18204) whose exact reverse step the network has already: :func:`~.forward_marginals.estimate`
gives unbiased gradients of the bound.
"""

from __future__ import annotations

from pathlib import Path as Folder

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.denoisers.checks import clean_log_probs
from ppl_diffusion.denoisers.direct_transformer import random_order
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.kernels.reveal_order import RevealOrder, ordered_law
from ppl_diffusion.models.forward_marginals import Estimate, estimate
from ppl_diffusion.models.latent_costs import LatentModel
from ppl_diffusion.processes.base import whole_number
from ppl_diffusion.processes.couplings import Maximum

ORDER_FILE = "order.safetensors"
"""Name of the file of an order, beside the network's."""

_SPREAD = 0.1
"""Standard deviation of what codes add at the start."""


@torch.enable_grad()
def fitted_order(
    model: LatentModel,
    sequences: Tensor,
    path: Path,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    draws: int,
    generator: torch.Generator | None = None,
) -> RevealOrder:
    """Learn when tokens are revealed on a path, the network being left alone.

    :param sequences: clean tokens, int64 ``(n, L)``.
    :param path: SEQ, with two steps of tokens or more.
    :param steps: of Adam, each on one step of the path per sequence.
    :param draws: noised states per sequence.
    :returns: an order without gradients.
    :raises CapabilityError: if the latent is no codes, or there is no encoder.
    :raises ValueError: if a number cannot be used, tokens have one step, or there is no sequence.
    """
    spec, first = model.denoiser.latent, path.first_token_step
    token_steps = path.num_steps - first
    if spec.num_codes is None:
        raise CapabilityError(
            "learn_order: an order is told by codes, and this latent holds vectors; use a prior "
            "with codes."
        )
    if token_steps < 2:
        raise ValueError(
            "learn_order: one step draws all tokens at once, and there is no order to learn; give "
            "2 token steps or more."
        )
    steps = whole_number(steps, "learn_order: steps")
    batch_size = whole_number(batch_size, "learn_order: batch_size")
    encoding = model.encoding(sequences)
    if len(sequences) == 0:
        raise ValueError("learn_order: there are no sequences; give some.")
    shape = (spec.num_slots, spec.num_codes, token_steps - 1, sequences.shape[1])
    order = _start(shape, sequences.device, generator)
    optimiser = torch.optim.Adam(order.parameters(), lr=learning_rate)
    for _ in range(steps):
        rows = _integers(len(sequences), batch_size, sequences.device, generator)
        offset = _integers(token_steps, 1, sequences.device, generator)
        t = (offset + torch.arange(batch_size, device=offset.device)) % token_steps + 1
        codes = encoding.draw(rows, generator)
        found = estimated_cost(model, order, path, sequences[rows], codes, t, draws, generator)
        optimiser.zero_grad()
        found.loss.mean().backward()
        optimiser.step()
    return order.requires_grad_(False)


def estimated_cost(
    model: LatentModel,
    order: RevealOrder,
    path: Path,
    x0: Tensor,
    codes: Tensor,
    t: Tensor,
    draws: int,
    generator: torch.Generator | None,
) -> Estimate:
    """Estimate what the tokens cost given their codes, at one step per sequence.

    From each token's cost that of the same token is taken where none is shown. Every token is
    revealed once, so that this changes the whole by a constant and the gradient by nothing but the
    noise, which is mostly that of costs that no order changes.

    :param x0: clean tokens, int64 ``(B, L)``.
    :param codes: int64 ``(B, N)``.
    :param t: steps from the end, 1 to ``Tx``, ``(B,)``.
    :param draws: noised states per sequence.
    :returns: an estimate whose loss has, for uniform ``t``, the gradient of the bound in the order;
        its value is another.
    """
    network, size = model.denoiser, model.process.vocab_size
    logits, times = order(codes), torch.tensor(path.levels, dtype=torch.float64, device=x0.device)
    clean = F.one_hot(x0, size + 1).to(torch.float64)
    shown = order.levels(codes).flip(0)[..., None]  # noise counts steps from the end
    marginals = shown * clean + (1 - shown) * F.one_hot(torch.full_like(x0, size), size + 1)

    @torch.no_grad()
    def predicted(z: Tensor, told: Tensor, step: Tensor) -> Tensor:
        level = times[path.first_token_step + step]
        rows = network.joint(z, level[:, 0], latent=told, latent_time=level[:, 1])
        return clean_log_probs(network.head(rows[:, : z.shape[1]]), z.shape, size)

    alone = predicted(torch.full_like(x0, size), codes, torch.zeros_like(t))
    alone = alone.gather(-1, x0[..., None])

    def reverse(states: Tensor, back: Tensor) -> Tensor:
        z, step = states.argmax(-1), order.token_steps - back
        row = torch.arange(len(z), device=z.device) % len(x0)
        gained = predicted(z, codes[row], step) - alone[row]
        return ordered_law(z, gained, logits[step, row])

    return estimate(marginals, reverse, Maximum(), t, draws=draws, generator=generator)


def _start(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> RevealOrder:
    positions = random_order(shape[-1], generator)
    source = positions.device
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=source)
    # Slots add up to the order of the positions.
    return RevealOrder((positions / shape[0] + _SPREAD * noise).to(device))


def _integers(
    high: int, count: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    source = device if generator is None else generator.device
    return torch.randint(high, (count,), generator=generator, device=source).to(device)


def write_order(order: RevealOrder, directory: str | Folder) -> None:
    """Write an order beside its network, as safetensors."""
    save_file({"table": order.table.detach().cpu().contiguous()}, Folder(directory) / ORDER_FILE)


def read_order(directory: str | Folder) -> RevealOrder:
    """Read back what :func:`write_order` wrote, without gradients; the same bits.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it holds something else.
    """
    path = Folder(directory) / ORDER_FILE
    if not path.exists():
        raise FileNotFoundError(f"LatentDiffusion: there is no {path}, which holds its order.")
    tensors = load_file(path)
    if "table" not in tensors:
        raise ValueError(f"LatentDiffusion: {path} holds no order; write it anew.")
    return RevealOrder(tensors["table"]).requires_grad_(False)
