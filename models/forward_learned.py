"""A prior whose noise was learned with it, for chains of few steps (FLDD, arXiv 2605.18204)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar, Self

import pyro
import torch
from pyro.distributions import Categorical
from torch import Tensor

from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.direct_transformer import DirectConfig, DirectTransformer
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import unroll
from ppl_diffusion.kernels import Absorbing, DirectKernel, Uniform
from ppl_diffusion.models.forward_marginals import Estimate, Marginals, estimate
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.processes.couplings import COUPLINGS, Coupling, at_step
from ppl_diffusion.processes.schedules import Schedule

_MADE = count()
"""Numbers the programs: what Pyro's store has under a name takes the place of a network's own."""


class ForwardLearned(DiffusionProgram):
    """A prior of a fixed number of steps, from masks; see :class:`DiffusionProgram` for the rest.

    What stands between the masks and the data was learned: a token may be hidden as another one, or
    with ``noise="reveals"`` be revealed sooner or later, as the whole sequence suggests. Known
    tokens are therefore a likelihood and no prompt, and the chain has no other number of steps.

    :param denoiser: a :class:`~ppl_diffusion.denoisers.direct_transformer.DirectTransformer`.
    :cvar starts_from: the family whose networks it may start from, or None.
    :param coupling: how neighbouring times belong together, a name of
        :data:`~ppl_diffusion.processes.couplings.COUPLINGS` or a
        :class:`~ppl_diffusion.processes.couplings.Coupling`, which cannot be saved; the bound
        depends on it.
    :raises ValueError: if there is no such coupling.
    """

    family: ClassVar[str] = "forward-learned"
    network: ClassVar[Any] = DirectTransformer
    config: ClassVar[Any] = DirectConfig
    starts_from: ClassVar[str | None] = "masked"
    denoiser: DirectTransformer

    def __init__(
        self,
        denoiser: DirectTransformer,
        *,
        vocabulary: Sequence[str],
        length: int,
        coupling: str | Coupling = "maximum",
        **options: Any,
    ) -> None:
        super().__init__(denoiser, vocabulary=vocabulary, length=length, **options)
        self.coupling = coupling
        self._module = f"{self.name}-{next(_MADE)}"

    @classmethod
    def build(
        cls,
        vocabulary: Sequence[str],
        length: int,
        *,
        coupling: str | Coupling = "maximum",
        **options: Any,
    ) -> Self:
        """Make an untrained program, see :meth:`DiffusionProgram.build`.

        :param coupling: as of the class.
        """
        made = super().build(vocabulary, length, **options)
        made.coupling = coupling
        return made

    @property
    def coupling(self) -> str | Coupling:
        """How neighbouring times belong together."""
        return self._coupling

    @coupling.setter
    def coupling(self, value: str | Coupling) -> None:
        if not isinstance(value, Coupling) and value not in COUPLINGS:
            raise ValueError(
                f"{type(self).__name__}: there is no coupling {value!r}; choose one of "
                f"{', '.join(COUPLINGS)}, or give a Coupling."
            )
        self._coupling = value

    @property
    def steps_coupling(self) -> Coupling:
        """The same as an object."""
        value = self.coupling
        return value if isinstance(value, Coupling) else COUPLINGS[value]()

    @staticmethod
    def make_process(vocab_size: int, schedule: Schedule) -> Absorbing | Uniform:
        """Return the process whose noisiest state the chain starts from: masks."""
        return Absorbing(vocab_size, schedule)

    @classmethod
    def starting_from(cls, prior: DiffusionProgram, **shape: Any) -> DiffusionProgram:
        """Return a program to be trained that knows what a masked prior knows.

        Its chain starts out as that prior's, of ``T`` steps, and its noise as the given one with
        the positions in a random order.

        :param prior: masked, or of this family.
        :param shape: fields of :class:`~ppl_diffusion.denoisers.direct_transformer.DirectConfig`
            that are no transformer's: ``num_steps``, ``noise``. The rest is the prior's.
        :raises ValueError: if the prior is of this family, and of other steps or noise.
        """
        network = prior.denoiser
        own = {field.name for field in dataclasses.fields(DirectConfig)}
        own -= {field.name for field in dataclasses.fields(TransformerConfig)}
        told = {key: value for key, value in shape.items() if key in own}
        if not (isinstance(network, Transformer) and prior.family == cls.starts_from):
            _require_same(prior, told)
            return super().starting_from(prior, **shape)
        config = {**dataclasses.asdict(network.config), **told, "kind": "posterior"}
        made = cls(
            DirectTransformer(DirectConfig(**config)),
            vocabulary=prior.vocabulary,
            length=prior.length,
            name=prior.name,
        )
        made.denoiser.start_from(network)
        return made

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps, and of network calls."""
        return self.denoiser.num_steps

    @property
    def fixed_steps(self) -> int:
        """``T``: there is no chain of another number of steps."""
        return self.num_steps

    def chain(  # type: ignore[override]  # nothing of a given noise can be chosen
        self, num_steps: int | None = None, *, prompt: Tensor | None = None
    ) -> ReverseChain:
        """Return the law of the reverse path, event shape ``(T + 1, L)``.

        :param num_steps: ``T`` or None.
        :param prompt: must be None.
        :raises CapabilityError: if there is a prompt, or another number of steps is asked for.
        """
        if num_steps not in (None, self.num_steps):
            raise CapabilityError(
                f"{self.name}: learned noise has {self.num_steps} steps, not {num_steps}; leave "
                "the number out, or train a prior of that many."
            )
        kernel = DirectKernel(self.process, self.denoiser, self.num_steps)
        return self.around(kernel, prompt=prompt)

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """Sample the site ``"path"`` and return its clean sequence, int64 ``(L,)``."""
        chain = self.chain(num_steps)
        return chain.x0(pyro.sample("path", chain))

    def marginals(self, x0: Tensor) -> Tensor:
        """Return ``u(x, t)``, float64 ``(T + 1, B, L, S)``, from clean to noisy.

        :param x0: clean tokens, int64 ``(B, L)``.
        :raises ValueError: if they are not.
        """
        self.require_clean(x0)
        network, masks = self.denoiser, self.denoiser.config.masks_only
        make = Marginals(network.marginal_logits, self.process, self.num_steps, masks_only=masks)
        return make.to(x0.device)(x0)

    def model(self, x0: Tensor) -> None:
        """Say how sequences came to be, for Pyro: a site per step, and the last one observed.

        Sites ``path_0`` (noise) to ``path_T`` (the sequences) in the plate ``sequences``. The
        network is a Pyro module under a name of its own, as one that Pyro has seen with another
        prior would train that one. ``Trace_ELBO`` of it and :meth:`guide` is the bound.

        :param x0: clean tokens, int64 ``(B, L)``.
        """
        pyro.module(self._module, self.denoiser)
        observed = pyro.condition(unroll(self), data={f"path_{self.num_steps}": x0})
        with pyro.plate("sequences", len(x0)):
            observed()

    def guide(self, x0: Tensor) -> None:
        """Draw what the learned noise made of sequences, from ``path_0`` on, as the model does.

        Its gradients are those of the score function of all steps, with more variance than
        :meth:`loss`, which draws none of the path but one state.

        :param x0: clean tokens, int64 ``(B, L)``.
        """
        pyro.module(self._module, self.denoiser)
        u, last = self.marginals(x0), self.num_steps
        with pyro.plate("sequences", len(x0)):
            z = pyro.sample("path_0", Categorical(u[last]).to_event(1))
            for t in range(last, 1, -1):
                coupling = at_step(self.steps_coupling, t, last, self.process.prior)
                rows = coupling.row(u[t - 1], u[t], z)
                z = pyro.sample(f"path_{last - t + 1}", Categorical(rows).to_event(1))

    def estimated(
        self,
        marginals: Tensor,
        t: Tensor,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Estimate:
        """Estimate the bound at one step per sequence, see :func:`estimate`.

        :param marginals: of the sequences.
        :param t: int64 ``(B,)``.
        """
        coupling, reverse = self.steps_coupling, self.denoiser.from_mixture
        return estimate(marginals, reverse, coupling, t, generator=generator, **options)

    def loss(
        self,
        batch: Tensor,
        *,
        labels: Tensor | None = None,
        label_dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Estimate the mean bound of a batch at one step per sequence, for its gradient.

        It trains the noise, the chain and the look-ahead; its value is that of the bound.

        :param batch: clean tokens, int64 ``(n, L)``.
        :param labels: must be None.
        :raises CapabilityError: if there are labels.
        """
        if labels is not None:
            raise CapabilityError(f"{self.name}: learned noise knows no classes; leave labels out.")
        t = self.drawn_steps(len(batch), generator).to(batch.device)
        found = self.estimated(self.marginals(batch), t, generator=generator)
        return (found.loss + self.look_ahead_loss(found, batch)).mean()

    def drawn_steps(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return steps, each as often as the others but for one, in random order."""
        source = torch.device("cpu") if generator is None else generator.device
        first = torch.randint(self.num_steps, (), generator=generator, device=source)
        order = torch.randperm(count, generator=generator, device=source)
        return (order + first) % self.num_steps + 1

    def look_ahead_loss(self, found: Estimate, batch: Tensor) -> Tensor:
        """Return what trains the look-ahead, ``(n,)``; its *value* is zero, as it bounds nothing.

        :param found: an estimate of the batch.
        """
        look = found.output[..., self.denoiser.num_states :].to(torch.float64)
        token = batch.expand(look.shape[:-1])[..., None]
        cost = -look.gather(-1, token)[..., 0].sum(-1).mean(0)
        return cost - cost.detach()

    @torch.no_grad()
    def bound_terms(
        self, x0: Tensor, *, num_times: int = 64, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw terms whose mean over the first axis bounds ``-log p(x0)`` from above.

        The bound is that of the chain that is sampled, of ``T`` steps. Each term is one state of
        every step, so that it costs ``T`` network rows.

        :param x0: clean tokens, int64 ``(n, L)``.
        :param num_times: terms per sequence.
        :returns: nats, float64 ``(num_times, n)``.
        """
        marginals = self.marginals(x0)
        terms = x0.new_zeros((num_times, len(x0)), dtype=torch.float64)
        for term in terms:
            for step in range(1, self.num_steps + 1):
                t = torch.full_like(x0[:, 0], step)
                found = self.estimated(marginals, t, draws=1, generator=generator)
                term += found.bound / self.num_steps
        return terms

    def settings(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs besides the network.

        :raises TypeError: if the coupling has no name.
        """
        if not isinstance(self.coupling, str):
            raise TypeError(
                f"{self.name}: a {type(self.coupling).__name__} coupling cannot be saved; choose "
                f"one of {', '.join(COUPLINGS)} first."
            )
        return {**super().settings(), "coupling": self.coupling}


def _require_same(prior: DiffusionProgram, told: dict[str, Any]) -> None:
    config = prior.denoiser.config if isinstance(prior, ForwardLearned) else None
    for key, value in told.items():
        found = getattr(config, key, value)
        if found != value:
            raise ValueError(
                f"{prior.name}: its noise was learned with {key} {found!r}, and {value!r} is "
                "another network; start from a masked prior, or ask for the same."
            )


class UniformForwardLearned(ForwardLearned):
    """The same from uniform noise, whose states are tokens alone."""

    family: ClassVar[str] = "forward-learned-uniform"
    starts_from: ClassVar[str | None] = None  # networks of given uniform noise read the time

    @staticmethod
    def make_process(vocab_size: int, schedule: Schedule) -> Uniform:
        """Return the process whose noisiest state the chain starts from: uniform tokens."""
        return Uniform(vocab_size, schedule)
