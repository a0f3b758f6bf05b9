"""Tiny networks that read a condition, for chains that depend on what was drawn before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.processes.base import Process


class LabelledTables:
    """An exact denoiser of one joint table per label; reads the condition ``label``.

    :param joints: probabilities, one table ``(V,) * L`` per label.
    :param process: forward process that noised the tokens.
    """

    kind: Kind = "cavity"
    conditions: Mapping[str, int] = {"label": 0}

    def __init__(self, joints: Sequence[Tensor], process: Process) -> None:
        self.tables = [TableDenoiser(joint, process) for joint in joints]
        self.process, self.vocab_size = process, process.vocab_size
        self.time_free = process.absorbing

    def __call__(self, tokens: Tensor, t: float | Tensor, /, label: Tensor) -> Tensor:
        """Return log-probabilities given each row's label, ``(*batch, L, V)``."""
        each = torch.stack([table(tokens, t) for table in self.tables])
        index = label.expand(tokens.shape[:-1])[None, ..., None, None]
        return each.gather(0, index.expand(1, *each.shape[1:]))[0]


class TiltedSites:
    """Independent positions over two tokens with log-odds ``2 * cond``; reads a number ``cond``.

    :param process: a process with two clean tokens.
    """

    kind: Kind = "cavity"
    conditions: Mapping[str, int] = {"cond": 0}
    time_free = True
    vocab_size = 2

    def __init__(self, process: Process) -> None:
        self.process = process

    def __call__(self, tokens: Tensor, t: float | Tensor, /, cond: Tensor) -> Tensor:
        """Return log-probabilities given each row's condition, ``(*batch, L, 2)``."""
        logits = torch.stack([cond, -cond], -1)[..., None, :].expand(*tokens.shape, 2)
        return torch.log_softmax(logits, -1)
