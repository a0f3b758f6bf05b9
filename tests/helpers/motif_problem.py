"""A problem of any length whose answers are known: a Markov chain rewarded for a motif.

The prior is a Markov chain along positions and ``log G(x)`` a weight times the number of
(overlapping) occurrences of a motif. What of the motif has been read so far is the state of a
string-matching automaton (Knuth, Morris and Pratt 1977, SIAM J. Comput. 6), so prior, potential
and automaton together are again a Markov chain, of ``V * m`` states for a motif of length ``m``.
Messages along it give the normalising constant, the value of any partly masked sequence, posterior
marginals and exact posterior draws, at a cost linear in the length, with or without a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Potential


@dataclass(frozen=True, eq=False)
class MotifProblem:
    """The law ``P(x | prompt) exp(weight * occurrences) / Z`` over sequences of ``V`` tokens.

    :param initial: law of the first token, float64 ``(V,)``.
    :param transition: row-stochastic matrix, float64 ``(V, V)``.
    :param length: number ``L`` of positions.
    :param motif: the tokens of the motif.
    :param weight: log-potential of one occurrence, in nats.
    :param prompt: tokens present from the start, int64 ``(L,)``, ``-1`` where free; None for none.
    """

    initial: Tensor
    transition: Tensor
    length: int
    motif: tuple[int, ...]
    weight: float
    prompt: Tensor | None = None

    @classmethod
    def random(
        cls,
        vocab_size: int = 4,
        length: int = 200,
        *,
        motif: tuple[int, ...] = (1, 2),
        weight: float = 1.0,
        sharpness: float = 1.0,
        seed: int = 0,
    ) -> MotifProblem:
        """Return a problem with a random Markov chain.

        :param motif: the tokens of the motif.
        :param weight: log-potential of one occurrence, in nats.
        :param sharpness: standard deviation of the log-probabilities.
        :param seed: seed of the chain.
        """
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(vocab_size + 1, vocab_size, generator=generator, dtype=torch.float64)
        probs = torch.softmax(sharpness * logits, -1)
        return cls(probs[0], probs[1:], length, motif, weight)

    def with_gaps(self, num_gaps: int, gap_length: int, *, seed: int = 0) -> MotifProblem:
        """Return the problem of filling gaps, at equal distances, in one prior draw.

        :param num_gaps: how many gaps.
        :param gap_length: positions of each.
        :param seed: seed of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        x0 = replace(self, weight=0.0, prompt=None).draw(1, generator)[0]
        period = self.length // num_gaps
        site = torch.arange(self.length)
        free = (site % period >= period - gap_length) & (site < num_gaps * period)
        return replace(self, prompt=torch.where(free, -1, x0))

    @property
    def vocab_size(self) -> int:
        """Number ``V`` of tokens."""
        return len(self.initial)

    @property
    def chain(self) -> ReverseChain:
        """The masked chain that reveals one position per step, with the exact denoiser.

        The law of its clean sequences is the prior itself given the prompt, so that its normalising
        constant is :attr:`log_z`.
        """
        process = Absorbing(self.vocab_size)
        denoiser = MarkovDenoiser(self.initial, self.transition, process)
        kernel = OrderedKernel(process, denoiser, length=self.length)
        return ReverseChain(kernel, self.length, prompt=self.prompt)

    @property
    def potential(self) -> Potential:
        """``log G`` as a potential."""
        return Potential(lambda x0: self.weight * self.occurrences(x0), name="motif")

    def occurrences(self, x0: Tensor) -> Tensor:
        """Return how often the motif occurs, overlaps included, float64 ``(*batch,)``.

        :param x0: clean sequences, int64 ``(*batch, L)``.
        """
        windows = x0.unfold(-1, len(self.motif), 1)
        return (windows == torch.tensor(self.motif)).all(-1).sum(-1).to(torch.float64)

    @property
    def log_z(self) -> float:
        """``log sum_x P(x | prompt) G(x)``."""
        return float(self.log_value(self.start)[0])

    @property
    def start(self) -> Tensor:
        """The noisiest state: the prompt, and masks elsewhere, int64 ``(1, L)``."""
        masked = torch.full((1, self.length), self.vocab_size)
        return masked if self.prompt is None else torch.where(self.prompt < 0, masked, self.prompt)

    @property
    def mean_occurrences(self) -> float:
        """Posterior mean of :meth:`occurrences`: the derivative of ``log Z`` by the weight."""
        weight = torch.tensor(self.weight, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            log_z = self._messages(self.start, weight)[1].sum()
            (slope,) = torch.autograd.grad(log_z, weight)
        return float(slope)

    @property
    def marginals(self) -> Tensor:
        """Posterior law of the token at each position, float64 ``(L, V)``."""
        messages, _ = self._messages(self.start, self._weight)
        transfer = self._transfer(self._weight)
        joint = self._start(self._weight) * messages[0][0]
        laws = [joint / joint.sum()]
        for message in messages[1:]:
            ahead = transfer @ message[0]
            moved = torch.where(ahead > 0, laws[-1] / ahead, 0.0) @ transfer * message[0]
            laws.append(moved / moved.sum())
        return torch.stack(laws).unflatten(-1, (self.vocab_size, -1)).sum(-1)

    def log_value(self, tokens: Tensor) -> Tensor:
        """Return ``log E[G(x0) | tokens]`` under the prior, float64 ``(*batch,)``.

        The optimal twist of :attr:`chain`, whatever the order of its reveals.

        :param tokens: partly masked sequences, int64 ``(*batch, L)``; the mask is id ``V``.
        """
        rows = tokens.reshape(-1, self.length)
        tilted, plain = (
            self._messages(rows, weight)[1] for weight in (self._weight, 0.0 * self._weight)
        )
        return (tilted - plain).reshape(tokens.shape[:-1])

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return independent draws of the posterior, int64 ``(num, L)``.

        :param num: how many.
        """
        messages, _ = self._messages(self.start, self._weight)
        transfer, tokens = self._transfer(self._weight), []
        law = self._start(self._weight).expand(num, -1)
        for message in messages:
            state = torch.multinomial(law * message, 1, generator=generator)[:, 0]
            tokens.append(state // len(self.motif))
            law = transfer[state]
        return torch.stack(tokens, -1)

    def draw_paths(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return independent posterior draws of paths of :attr:`chain`, int64 ``(num, L + 1, L)``.

        With the exact denoiser every order of reveals is as likely as any other, whatever is
        revealed.

        :param num: how many.
        """
        x0, shape = self.draw(num, generator), (num, self.length)
        turn = torch.rand(shape, generator=generator, dtype=torch.float64)
        turn = turn.masked_fill(self.start < self.vocab_size, -1.0)
        rank = turn.argsort(-1).argsort(-1)[:, None]
        known = (self.start < self.vocab_size).sum()
        shown = rank < known + torch.arange(self.length + 1)[:, None]
        return torch.where(shown, x0[:, None], self.vocab_size)

    @property
    def _weight(self) -> Tensor:
        return torch.tensor(self.weight, dtype=torch.float64)

    def _start(self, weight: Tensor) -> Tensor:
        """Return the tilted law of the first joint state ``token * m + matched``, ``(V * m,)``."""
        size, (after, ends) = len(self.motif), _automaton(self.motif, self.vocab_size)
        first = torch.zeros(self.vocab_size * size, dtype=torch.float64)
        goal = torch.arange(self.vocab_size) * size + after[0]
        return first.index_add(0, goal, self.initial * torch.exp(weight * ends[0]))

    def _transfer(self, weight: Tensor) -> Tensor:
        """Return ``P(v' | v) exp(weight * [a motif ends here])`` on joint states."""
        vocab, size = self.vocab_size, len(self.motif)
        after, ends = _automaton(self.motif, vocab)
        goal = torch.arange(vocab) * size + after  # (m, V)
        reached = torch.nn.functional.one_hot(goal, vocab * size).to(torch.float64)
        gain = torch.exp(weight * ends.to(torch.float64))
        return torch.einsum("vw,qw,qws->vqs", self.transition, gain, reached).flatten(0, 1)

    def _messages(self, tokens: Tensor, weight: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what each joint state sees from there on, its own token included, and the mass."""
        allowed = (tokens[..., None] == torch.arange(self.vocab_size)) | (
            tokens == self.vocab_size
        )[..., None]
        emission = allowed.to(torch.float64).repeat_interleave(len(self.motif), -1)
        transfer, log_scale = self._transfer(weight), torch.zeros(len(tokens), dtype=torch.float64)
        messages = [emission[:, -1]]
        for site in range(self.length - 2, -1, -1):
            message = emission[:, site] * (messages[-1] @ transfer.T)
            scale = message.amax(-1, keepdim=True)
            messages.append(message / scale)
            log_scale = log_scale + scale[:, 0].log()
        messages.reverse()
        return messages, torch.log(messages[0] @ self._start(weight)) + log_scale


def _automaton(motif: tuple[int, ...], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the next state and whether the motif ends, both ``(m, V)``."""
    size = len(motif)
    after = torch.zeros(size, vocab_size, dtype=torch.int64)
    ends = torch.zeros(size, vocab_size, dtype=torch.bool)
    for matched in range(size):
        for token in range(vocab_size):
            read = (*motif[:matched], token)
            ends[matched, token] = read == motif
            borders = [q for q in range(min(size - 1, len(read)) + 1) if _is_suffix(motif, q, read)]
            after[matched, token] = max(borders)
    return after, ends


def _is_suffix(motif: tuple[int, ...], size: int, read: tuple[int, ...]) -> bool:
    return read[len(read) - size :] == motif[:size]
