"""All sequences of a program as one: its chain sites, plates and all, side by side in one row.

A particle of a program with several chains holds several sequences, which no potential of one
sequence can rate one by one. Chains that move alike are therefore run as *one* chain over the
concatenation of their sequences, whose denoiser predicts each from its own part
(:class:`~ppl_diffusion.denoisers.JointDenoiser`):

- on a time grid the joint chain is the product of the chains, step by step;
- chains that reveal one position per step become one that reveals all positions in one uniformly
  random order. Within each sequence the order is uniform and independent of the others, so for a
  denoiser that does not read the time the moves of each sequence have the law of its own chain.

Behind the sequences there may be *labels*: positions that never change and travel with a particle,
through every look-ahead and every cache. They say, in digits, which row of a table is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers import JointDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.inference._sites import ChainSite
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Kernel, OrderedKernel, Process


@dataclass(frozen=True)
class Slot:
    """Where the sequences of one site lie in the row.

    :param site: the chain site.
    :param start: first position.
    """

    site: ChainSite
    start: int

    @property
    def copies(self) -> int:
        """Sequences of the site, one per element of its plates."""
        return self.site.chain.batch_shape.numel()

    @property
    def stop(self) -> int:
        """First position behind them."""
        return self.start + self.copies * self.site.chain.length

    def own(self, states: Tensor) -> Tensor:
        """Return the states of the site, ``(*batch, *plates, L)``.

        :param states: states of the row, ``(*batch, L)``.
        """
        chain = self.site.chain
        part = states[..., self.start : self.stop]
        return part.reshape(*part.shape[:-1], *chain.batch_shape, chain.length)


class Layout:
    """How the sequences of some sites lie in one row, and the chain of such rows.

    One sequence without labels is left as it is.

    :param sites: the chain sites.
    :param num_rows: rows of the table that labels must be able to tell apart; 0 for no labels.
    :param owner: what refusals call the program.
    :raises CapabilityError: if the chains cannot be run as one.
    """

    def __init__(self, sites: Sequence[ChainSite], num_rows: int = 0, owner: str = "") -> None:
        self.slots, start = [], 0
        for site in sites:
            self.slots.append(Slot(site, start))
            start = self.slots[-1].stop
        self.size = start
        self.plain = start == sites[0].chain.length and num_rows == 0 and len(sites) == 1
        self.plain = self.plain and not sites[0].chain.batch_shape
        if self.plain:
            self.chain, self.num_labels = sites[0].chain, 0
            return
        _require_alike(self.slots, owner)
        process = _common_process([site.chain.kernel.process for site in sites])
        self._base = process.vocab_size
        self.num_labels = _num_digits(num_rows, self._base) if num_rows else 0
        self.chain = _joint_chain(self.slots, process, self.num_labels)

    @property
    def num_sequences(self) -> int:
        """Sequences in a row."""
        return sum(slot.copies for slot in self.slots)

    @property
    def clamp(self) -> ClampProposal | None:
        """The clamps of all sites as one of the row, or None."""
        if all(slot.site.clamp is None for slot in self.slots):
            return None
        tokens = torch.zeros(self.chain.length, dtype=torch.int64)
        mask = torch.zeros(self.chain.length, dtype=torch.bool)
        for slot in self.slots:
            clamp = slot.site.clamp
            if clamp is not None:
                tokens[slot.start : slot.stop] = clamp.tokens.repeat(slot.copies)
                mask[slot.start : slot.stop] = clamp.mask.repeat(slot.copies)
        return ClampProposal(tokens, mask, self.chain.kernel.process.vocab_size)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the clean sequences of every site, ``(*batch, *plates, L)``.

        :param rows: int64 ``(*batch, L)``.
        """
        return {slot.site.name: slot.own(rows) for slot in self.slots}

    def first(self, states: Tensor, *, whole_path: bool = False) -> Tensor:
        """Return the states of the first site, which is what posteriors show as their own.

        :param states: ``(*batch, L)``, or ``(*batch, T + 1, L)``: returned as
            ``(*batch, *plates, T + 1, L)``.
        :param whole_path: whether they are paths.
        """
        if self.plain:
            return states
        slot = self.slots[0]
        own = slot.own(states)
        if whole_path:
            own = _times_inside(own, len(slot.site.chain.batch_shape))
        return self._own_ids(own, slot)

    def as_paths(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the clean sequences of every site, each repeated as if it were a whole path.

        :param rows: int64 ``(*batch, L)``.
        """
        paths = {}
        for slot in self.slots:
            own, steps = slot.own(rows), slot.site.chain.num_steps
            shape = (*own.shape[:-1], steps + 1, own.shape[-1])
            paths[slot.site.name] = own[..., None, :].expand(shape)
        return paths

    def own_paths(self, path: Tensor) -> dict[str, Tensor]:
        """Return the path of every site, ``(*batch, *plates, T' + 1, L')``, as its own chain's.

        Where the joint chain reveals one position at a time that is the states at which the
        sequence itself moved.

        :param path: paths of the row, int64 ``(*batch, T + 1, L)``.
        """
        return {slot.site.name: self._own_path(path, slot) for slot in self.slots}

    def _own_path(self, path: Tensor, slot: Slot) -> Tensor:
        chain = slot.site.chain
        own = self._own_ids(_times_inside(slot.own(path), len(chain.batch_shape)), slot)
        if self.num_sequences == 1 or isinstance(self.chain.kernel, InterpolatingKernel):
            return own[..., : chain.num_steps + 1, :]
        revealed = (own != chain.kernel.process.vocab_size).sum(-1)
        moves = revealed - revealed[..., :1]  # made so far, after each step of the row
        step = torch.arange(chain.num_steps + 1)[:, None]
        when = (moves[..., None, :] < step).sum(-1).clamp_max(path.shape[-2] - 1)
        return own.take_along_dim(when[..., None], -2)

    def _own_ids(self, states: Tensor, slot: Slot) -> Tensor:
        """Return states with the mask id of the site's own alphabet."""
        process, own = self.chain.kernel.process, slot.site.chain.kernel.process
        if not own.absorbing or own.vocab_size == process.vocab_size:
            return states
        return torch.where(states == process.vocab_size, own.vocab_size, states)

    def legal(self, rows: Tensor) -> Tensor:
        """Return whether all tokens belong to the alphabets of their sites, bool ``(*batch,)``.

        Look-aheads ask about every token of the largest alphabet at every position.

        :param rows: clean rows, int64 ``(*batch, L)``.
        """
        legal = torch.ones(rows.shape[:-1], dtype=torch.bool)
        for slot in self.slots:
            own = rows[..., slot.start : slot.stop]
            legal = legal & (own < slot.site.chain.kernel.process.vocab_size).all(-1)
        return legal

    def labelled(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return states that carry the given labels.

        :param states: int64 ``(*batch, ..., L)``.
        :param labels: whole numbers, ``(*batch,)``.
        :raises ValueError: if there are not enough digits for one of them.
        """
        if int(labels.max()) >= self._base**self.num_labels:
            raise ValueError(
                f"{int(labels.max()) + 1} particles were started, but the row has labels for "
                f"{self._base**self.num_labels}; read the program with a larger max_particles."
            )
        powers = self._base ** torch.arange(self.num_labels)
        digits = labels[..., None] // powers % self._base
        extra = (1,) * (states.ndim - digits.ndim)
        digits = digits.reshape(*labels.shape, *extra, -1)
        digits = digits.expand(*states.shape[:-1], -1)
        return torch.cat([states[..., : self.size], digits], -1)

    def labels(self, rows: Tensor) -> Tensor:
        """Return the labels of rows, int64 ``(*batch,)``.

        :param rows: int64 ``(*batch, L)``.
        """
        powers = self._base ** torch.arange(self.num_labels)
        return (rows[..., self.size :] * powers).sum(-1)

    @property
    def words(self) -> str:
        """What the row is made of, to follow "the chain"; empty for one plain sequence."""
        if self.num_sequences == 1:
            return ""
        names = ", ".join(repr(slot.site.name) for slot in self.slots)
        order = ", revealed in one uniformly random order"
        order = order if isinstance(self.chain.kernel, OrderedKernel) else ""
        return f" of the {self.num_sequences} sequences at {names} side by side{order}"


def _times_inside(states: Tensor, num_plates: int) -> Tensor:
    """Move the times, which lie left of the plates, to their right."""
    return states.movedim(-2 - num_plates, -2) if num_plates else states


def _require_alike(slots: Sequence[Slot], owner: str) -> None:
    reason = _difference(slots)
    if reason is None:
        return
    raise CapabilityError(
        f"{owner}: {reason}, so that its sequences cannot be run as one chain; use "
        "ppl_diffusion.inference.SMC, which moves every chain by itself."
    )


def _difference(slots: Sequence[Slot]) -> str | None:
    """Return why some chains are not one chain side by side, None if they are."""
    kernels = [slot.site.chain.kernel for slot in slots]
    names = ", ".join(repr(slot.site.name) for slot in slots)
    for slot, kernel in zip(slots, kernels, strict=True):
        if type(kernel) not in (InterpolatingKernel, OrderedKernel):
            return f"the chain {slot.site.name!r} runs on {type(kernel).__name__}"
    if len({type(kernel) for kernel in kernels}) > 1:
        return f"the chains {names} have kernels of different kinds"
    if not all(_same_noise(kernels[0].process, kernel.process) for kernel in kernels):
        return f"the chains {names} have different noise or schedules"
    if isinstance(kernels[0], OrderedKernel):
        return _order_difference(slots)
    if not all(np.array_equal(kernel.times, kernels[0].times) for kernel in kernels):
        return f"the chains {names} have different time grids"
    if not kernels[0].process.absorbing and len({k.denoiser.kind for k in kernels}) > 1:
        return f"the chains {names} have denoisers of different kinds"
    return None


def _order_difference(slots: Sequence[Slot]) -> str | None:
    several = len(slots) > 1 or slots[0].copies > 1
    for slot in slots:
        kernel = slot.site.chain.kernel
        assert isinstance(kernel, OrderedKernel)
        if not kernel.denoiser.time_free:
            return f"the denoiser of {slot.site.name!r} reads the time, which is the row's"
        if several and (kernel.group_size > 1 or kernel.block < kernel.length):
            return f"the chain {slot.site.name!r} reveals groups or blocks of positions"
    return None


def _num_digits(num_rows: int, base: int) -> int:
    if base < 2:
        raise CapabilityError(
            "a program with latents needs an alphabet of two tokens or more, to tell particles "
            "apart by; use ppl_diffusion.inference.SMC."
        )
    count = 1
    while base**count < num_rows:
        count += 1
    return count


def _same_noise(process: Process, other: Process) -> bool:
    if process.absorbing and other.absorbing:
        return process.schedule == other.schedule
    return process.schedule == other.schedule and np.array_equal(process.prior, other.prior)


def _common_process(processes: Sequence[Process]) -> Process:
    """Return the process with the largest alphabet; labels need two tokens to be written with."""
    largest = max(processes, key=lambda process: process.vocab_size)
    if largest.absorbing and largest.vocab_size == 1:
        return Absorbing(2, largest.schedule)
    return largest


def _joint_chain(slots: Sequence[Slot], process: Process, num_labels: int) -> ReverseChain:
    chains = [slot.site.chain for slot in slots for _ in range(slot.copies)]
    parts = [(chain.kernel.denoiser, chain.length) for chain in chains]
    denoiser = JointDenoiser(process, parts, num_labels=num_labels)
    kernel: Kernel
    first = chains[0].kernel
    if isinstance(first, OrderedKernel):
        kernel = OrderedKernel(
            process,
            denoiser,
            length=denoiser.length,
            group_size=first.group_size,
            block=None if first.block == first.length else first.block,
        )
    else:
        kappa = _joint_kappa(chains, num_labels)
        kernel = InterpolatingKernel(process, denoiser, times=first.times, kappa=kappa)
    return ReverseChain(kernel, denoiser.length, prompt=_joint_prompt(slots, num_labels))


def _joint_kappa(chains: Sequence[ReverseChain], num_labels: int) -> np.ndarray:
    """Return the Psi parameters of the row, ``(T, L)``, or ``(T,)`` where all sites agree."""
    kappas = [chain.kernel.kappa for chain in chains]  # type: ignore[attr-defined]
    if all(kappa.ndim == 1 and np.array_equal(kappa, kappas[0]) for kappa in kappas):
        shared: np.ndarray = kappas[0]
        return shared
    each = [
        np.broadcast_to(kappa.reshape(len(kappa), -1), (len(kappa), chain.length))
        for kappa, chain in zip(kappas, chains, strict=True)
    ]
    return np.concatenate([*each, np.ones((len(each[0]), num_labels))], 1)


def _joint_prompt(slots: Sequence[Slot], num_labels: int) -> Tensor | None:
    chains = [slot.site.chain for slot in slots]
    if num_labels == 0 and all(chain.prompt is None for chain in chains):
        return None
    free = torch.tensor(-1)
    parts = [
        (free if chain.prompt is None else chain.prompt)
        .expand(*chain.batch_shape, chain.length)
        .flatten()
        for chain in chains
    ]
    return torch.cat([*parts, torch.zeros(num_labels, dtype=torch.int64)])
