"""Masked diffusion with a latent beside its tokens (LADD, arXiv 2510.18114).

A masked step draws tokens independently of each other; at few steps that is what it gets wrong. A
latent, codes or vectors, can carry what they have in common. Which of the two moves when is a
:class:`~ppl_diffusion.kernels.path.Path`: the latent first (SEQ), both at once (JOINT), in turns,
or tokens alone, all with one network.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path as Folder
from typing import Any, ClassVar, Literal, Protocol, Self

import pyro
import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import move
from ppl_diffusion.denoisers.latent import LatentDenoiser, LatentSpec
from ppl_diffusion.denoisers.latent_config import LatentConfig
from ppl_diffusion.denoisers.latent_transformer import LatentTransformer
from ppl_diffusion.denoisers.latent_views import AtLatent, CodeDenoiser
from ppl_diffusion.distributions import GaussianChain, ReverseChain
from ppl_diffusion.errors import CapabilityError, IntractableLogProb
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.kernels.latent_kernel import LatentKernel
from ppl_diffusion.kernels.latent_solvers import LatentSolver
from ppl_diffusion.kernels.path import PATHS, Path
from ppl_diffusion.kernels.reveal_order import RevealOrder
from ppl_diffusion.models.latent_bound import (
    LatentBound,
    constant_cost,
    drawn_steps,
    path_bound,
    path_terms,
    published_surrogate,
)
from ppl_diffusion.models.latent_costs import Encoding
from ppl_diffusion.models.latent_loss import training_loss
from ppl_diffusion.models.latent_order import ORDER_FILE, fitted_order, read_order, write_order
from ppl_diffusion.models.path_costs import estimate_costs
from ppl_diffusion.models.path_search import PathCosts, best_path
from ppl_diffusion.models.program import DiffusionProgram, read_schedule, schedule_entry
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.schedules import Linear, Schedule

DEFAULT_STEPS = 16
"""Network evaluations of the default path."""

FEW_STEPS = 16
"""Below so many steps a path that draws tokens and latent at once is warned of."""


class Encoder(Protocol):
    """What turns clean sequences into their latents.

    An encoder that draws its codes also has a method ``log_probs(x0)``, their law, ``(n, N, K)``.
    """

    def __call__(self, x0: Tensor, /) -> Tensor:
        """Return codes, int64 ``(n, N)``, or vectors, ``(n, N, d)``."""
        ...


class LatentDiffusion(DiffusionProgram):
    """A prior over sequences and a latent of each; see :class:`DiffusionProgram` for the rest.

    Calling it samples the site ``"path"``, tokens and latent of the default path packed into one
    value; a chain takes them apart by its ``x0`` and ``latent``. With :meth:`latent_chain` and
    :meth:`token_chain` the two are sites of their own.

    :param denoiser: a :class:`~ppl_diffusion.denoisers.latent.LatentDenoiser`.
    :param latent_schedule: how the latent is noised: a schedule of its codes (linear by default);
        for vectors the name of one of :data:`~ppl_diffusion.processes.gaussian.SQUARED_SIGNALS`
        (``"sqrt"`` by default) or a schedule.
    :param t_min: time at which the chain of a continuous latent ends, 0.1 by default.
    :param path: the default path: the latent first, in half of 16 steps (for codes in no more
        steps than there are slots), then the tokens.
    :param encoder: what turns sequences into latents, by default ``denoiser.encode``.
    :param order: when tokens are revealed on the default path, given the codes; :meth:`learn_order`
        finds one. Other paths do without.
    :raises CapabilityError: if the denoiser predicts no latent, or an order fits no such path.
    :raises ValueError: if an argument does not fit the latent.

    :ivar latent: what the latent is.
    :ivar latent_process: absorbing process of the codes, or Gaussian process of the vectors.
    """

    family: ClassVar[str] = "latent"
    network: ClassVar[Any] = LatentTransformer
    denoiser: LatentDenoiser

    def __init__(
        self,
        denoiser: LatentDenoiser,
        *,
        vocabulary: Sequence[str],
        length: int,
        name: str = "prior",
        schedule: Schedule | None = None,
        latent_schedule: Schedule | str | None = None,
        t_min: float | None = None,
        path: Path | None = None,
        encoder: Encoder | None = None,
        order: RevealOrder | None = None,
    ) -> None:
        super().__init__(
            denoiser, vocabulary=vocabulary, length=length, name=name, schedule=schedule
        )
        spec = getattr(denoiser, "latent", None)
        if not isinstance(spec, LatentSpec):
            raise CapabilityError(
                f"{self.name}: a {type(denoiser).__name__} predicts no latent; give a "
                "LatentDenoiser, or use MaskedDiffusion."
            )
        self.latent = spec
        self.latent_process = _latent_process(spec, latent_schedule, t_min)
        self.path = path or self.split_steps(DEFAULT_STEPS)
        self.encoder, self.order = encoder, order
        if order is not None:
            order.check_length(self.length)
            order.check(spec, self.path)
        # One object for all chains: kernels know laws apart by the identity of their denoisers.
        self._reader = AtLatent(denoiser)
        self._code_readers: dict[tuple[int, ...], CodeDenoiser] = {}

    @staticmethod
    def make_process(vocab_size: int, schedule: Schedule) -> Absorbing:
        """Return the absorbing process of the tokens; the mask has the id ``vocab_size``."""
        return Absorbing(vocab_size, schedule)

    @classmethod
    def build(
        cls,
        vocabulary: Sequence[str],
        length: int,
        *,
        name: str = "prior",
        schedule: Schedule | None = None,
        latent_schedule: Schedule | str | None = None,
        t_min: float | None = None,
        path: Path | None = None,
        **shape: Any,
    ) -> Self:
        """Make an untrained program around a transformer of two streams, ready to be trained.

        :param shape: fields of :class:`~ppl_diffusion.denoisers.latent_config.LatentConfig` that
            the vocabulary and the length do not decide: ``num_slots``, ``num_codes``, ...
        """
        network: Any = LatentTransformer(LatentConfig(len(vocabulary), length, **shape))
        return cls(
            network,
            vocabulary=vocabulary,
            length=length,
            name=name,
            schedule=schedule,
            latent_schedule=latent_schedule,
            t_min=t_min,
            path=path,
        )

    def to(self, device: torch.device | str) -> Self:
        """Move network, encoder and order, in place as torch does, and return the program."""
        move(self.encoder, device)
        move(self.order, device)
        return super().to(device)

    # Latents of sequences.

    def encode_latent(self, x0: Tensor) -> Tensor:
        """Return the latents of clean sequences, codes ``(n, N)`` or vectors ``(n, N, d)``.

        Of an encoder that draws its codes, the likeliest ones.

        :param x0: int64 ``(n, L)``.
        """
        return self.encoding(x0).point

    def encoding(self, x0: Tensor) -> Encoding:
        """Return what the encoder says of clean sequences, without gradients for a network's own.

        :param x0: int64 ``(n, L)``.
        :raises CapabilityError: if there is no encoder.
        :raises ValueError: if these are no clean sequences.
        """
        self.require_clean(x0)
        encoder = self.encoder or getattr(self.denoiser, "encode", None)
        if encoder is None:
            raise CapabilityError(
                f"{self.name}: a {type(self.denoiser).__name__} has no encoder; give one as "
                "encoder=."
            )
        law = getattr(encoder, "log_probs", None)
        if law is not None:
            log_probs = law(x0)
            return Encoding(log_probs.argmax(-1), log_probs)
        point = encoder(x0)
        # In the precision of the chain.
        return Encoding(point if self.latent.dim is None else point.to(torch.float64))

    def _finished(self, latent: Any) -> Tensor:
        """Return a finished latent as a tensor, after checking that it is one."""
        # Made from others it would forget where it came from, which readers of programs ask.
        value = latent if isinstance(latent, Tensor) else torch.as_tensor(latent)
        value, spec = value.to(self.device), self.latent
        event = spec.event_shape
        shape = tuple(value.shape[max(value.ndim - len(event), 0) :])
        if spec.num_codes is None:
            good = shape == event and value.is_floating_point()
            wanted = f"finite numbers of shape (*batch, {spec.num_slots}, {spec.dim})"
            inside = good and bool(torch.isfinite(value).all())
        else:
            good = shape == event and value.dtype == torch.int64
            wanted = f"int64 codes 0 to {spec.num_codes - 1} of shape (*batch, {spec.num_slots})"
            inside = good and bool(((value >= 0) & (value < spec.num_codes)).all())
        if not inside:
            raise ValueError(
                f"{self.name}: a finished latent holds {wanted}, got {value.dtype} of shape "
                f"{tuple(value.shape)}{' with others' if good else ''}; latent_chain draws them, "
                "and encode_latent reads them off sequences."
            )
        return value

    # Chains.

    def split_steps(self, num_steps: int) -> Path:
        """Return the path of SEQ with so many evaluations.

        Half of them, rounded down, go to the latent, but to codes no more than there are slots
        (each step can reveal one); the rest to the tokens. One evaluation is a masked step.
        """
        if num_steps == 1:
            return Path.masked(1)
        slots = self.latent.num_slots if self.latent.dim is None else num_steps
        latent_steps = min(num_steps // 2, slots)
        return Path.sequential(latent_steps, num_steps - latent_steps)

    def find_path(
        self,
        path: Path | str | int | None = None,
        *,
        num_steps: int | None = None,
        latent_steps: int | None = None,
        token_steps: int | None = None,
    ) -> Path:
        """Return a path by what was said of it.

        :param path: a path, the name of one (:data:`~ppl_diffusion.kernels.path.PATHS`), a number
            of evaluations, or None for the default path or SEQ.
        :param num_steps: argument of a named path; of SEQ, or without a name, evaluations that
            :meth:`split_steps` divides.
        :param latent_steps: or both numbers of SEQ, with ``token_steps``.
        :raises ValueError: if the name is unknown, or the numbers do not fit it.
        """
        steps = (latent_steps, token_steps)
        if isinstance(path, int):
            path, num_steps = None, path if num_steps is None else num_steps
        alone = steps == (None, None)
        if not (path is None or isinstance(path, str | Path)):
            path = Path(path)
        if isinstance(path, Path) or (path is None and num_steps is None and alone):
            if num_steps is not None or not alone:
                raise ValueError(f"{self.name}: a path has its own steps; leave the numbers out.")
            return path or self.path
        name = path or "seq"
        if name not in PATHS:
            raise ValueError(f"There is no path {name!r}: choose one of {', '.join(PATHS)}.")
        if name == "seq" and None not in steps and num_steps is None:
            return Path.sequential(*steps)  # type: ignore[arg-type]  # both are there
        if num_steps is None or not alone:
            wanted = "num_steps, or latent_steps and token_steps" if name == "seq" else "num_steps"
            raise ValueError(f"{self.name}: the path {name!r} takes {wanted}; give just that.")
        named: dict[str, Any] = {**PATHS, "seq": self.split_steps}
        found: Path = named[name](num_steps)
        return found

    def chain(  # type: ignore[override]  # its path decides what kappa decides elsewhere
        self,
        path: Path | str | int | None = None,
        *,
        num_steps: int | None = None,
        latent_steps: int | None = None,
        token_steps: int | None = None,
        solver: LatentSolver | None = None,
        prompt: Tensor | None = None,
    ) -> ReverseChain:
        """Return the law of tokens and latent along a path, packed, event shape ``(T + 1, W)``.

        The path is that of :meth:`find_path`. One with few steps that draws tokens and latent at
        once is warned of: the two are then independent of each other, and can contradict. On the
        default path tokens are revealed by :attr:`order`, where there is one.

        :param solver: how a continuous latent moves; DDPM's own steps by default.
        :param prompt: int64 ``(L,)``, tokens that are there from the start, -1 elsewhere.
        """
        found = self.find_path(
            path, num_steps=num_steps, latent_steps=latent_steps, token_steps=token_steps
        )
        if not found.one_at_a_time and found.num_steps < FEW_STEPS:
            warnings.warn(
                f"{self.name}: steps of {found!r} draw tokens and latent at once, independently of "
                "each other, which costs much at few steps; finish the latent first (path='seq') "
                "or take turns (path='ordered').",
                stacklevel=2,
            )
        kernel = LatentKernel(
            self.process,
            self.latent_process,
            self.denoiser,
            found,
            solver=solver,
            order=self._order_on(found),
        )
        return self.around(kernel, prompt=prompt)

    def _order_on(self, path: Path) -> RevealOrder | None:
        if self.order is None or path != self.path:
            return None
        self.order.check(self.latent, path)  # the default path may have been exchanged
        return self.order

    def latent_chain(
        self,
        num_steps: int | None = None,
        *,
        solver: LatentSolver | None = None,
        prompt: Tensor | None = None,
    ) -> ReverseChain | GaussianChain:
        """Return the law of the latent before there are tokens, the first half of SEQ.

        It is a site of its own: sample it, then ``prior.token_chain(latent=...)`` of its last row.

        :param num_steps: steps; None for those of the default path.
        :param solver: how a continuous latent moves.
        :param prompt: int64 ``(L,)``, tokens that are known already, -1 elsewhere.
        :returns: a chain over the codes, or over vectors.
        """
        levels = self._levels(1, num_steps)
        process = self.latent_process
        if isinstance(process, Gaussian):
            return GaussianChain(
                process, self.denoiser, self.length, levels, solver=solver, prompt=prompt
            )
        if solver is not None:
            raise TypeError(f"{self.name}: codes are drawn, not solved for; leave the solver out.")
        masks = torch.full((self.length,), len(self.vocabulary), device=self.device)
        known = masks if prompt is None else torch.as_tensor(prompt, device=self.device)
        tokens = torch.where(known >= 0, known, masks)
        kernel = InterpolatingKernel(process, self._code_reader(tokens), times=levels)
        return ReverseChain(kernel, self.latent.num_slots)

    def _code_reader(self, tokens: Tensor) -> CodeDenoiser:
        # One object for one prompt: programs that build the chain anew know it again by that.
        key = tuple(tokens.tolist())
        if key not in self._code_readers:
            self._code_readers[key] = CodeDenoiser(self.denoiser, tokens)
        return self._code_readers[key]

    def token_chain(
        self, num_steps: int | None = None, *, latent: Tensor, prompt: Tensor | None = None
    ) -> ReverseChain:
        """Return the law of the tokens given a finished latent, the second half of SEQ.

        :param num_steps: steps; None for those of the default path.
        :param latent: ``(*batch, N)`` codes or ``(*batch, N, d)``, the batch of the chain.
        :param prompt: int64 ``(L,)``, tokens that are there from the start, -1 elsewhere.
        :raises CapabilityError: if the steps are those of the default path, and it has an order.
        """
        if num_steps is None and self.order is not None:
            raise CapabilityError(
                f"{self.name}: the tokens of the default path have a learned order, which only "
                "chain() follows; give num_steps for equal steps, or take chain()."
            )
        kernel = InterpolatingKernel(self.process, self._reader, times=self._levels(0, num_steps))
        prompt = None if prompt is None else torch.as_tensor(prompt, device=self.device)
        given = {"latent": self._finished(latent)}
        return ReverseChain(kernel, self.length, prompt=prompt, given=given)

    def code_law(
        self, num_steps: int | None = None, *, prompt: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return all codes and what :meth:`latent_chain` gives them, where they are few.

        ``pyro.sample("which", Categorical(logits=log_probs))`` is then a latent that can be
        enumerated, and ``codes[which]`` the condition of :meth:`token_chain`.

        :param num_steps: steps of the latent; None for those of the default path.
        :param prompt: int64 ``(L,)``, tokens that are known already, -1 elsewhere.
        :returns: codes, int64 ``(K ** N, N)``, and their log-probabilities, float64 ``(K ** N,)``.
        :raises CapabilityError: if the latent is continuous.
        :raises IntractableLogProb: if they are too many to list.
        """
        chain = self.latent_chain(num_steps, prompt=prompt)
        if isinstance(chain, GaussianChain):
            raise CapabilityError(
                f"{self.name}: the latent is continuous and cannot be listed; sample latent_chain."
            )
        marginal, spec = chain.marginal(), self.latent
        try:
            codes = marginal.enumerate_support()
            return codes, marginal.log_prob(codes)
        except (NotImplementedError, IntractableLogProb) as error:
            raise IntractableLogProb(
                f"{self.name}: {spec.num_slots} slots of {spec.num_codes} codes are too many to "
                "list; sample latent_chain."
            ) from error

    def _levels(self, channel: int, num_steps: int | None) -> list[float]:
        """Return levels of tokens (0) or of the latent (1) that fall from 1 to 0."""
        if num_steps is not None:
            return [pair[0] for pair in Path.masked(num_steps).levels]
        levels = sorted({pair[channel] for pair in self.path.levels}, reverse=True)
        if levels[-1] != 0.0:
            raise ValueError(f"{self.name}: the default path draws no latent; give num_steps.")
        return levels

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """Sample the site ``"path"`` and return its clean sequence, int64 ``(L,)``.

        :param num_steps: evaluations of SEQ; None for the default path.
        """
        chain = self.chain(num_steps)
        return chain.x0(pyro.sample("path", chain))

    # Bounds.

    def bound(
        self,
        x0: Tensor,
        path: Path | None = None,
        *,
        num_samples: int = 4,
        num_steps: int | None = None,
        surrogate: Literal["mse"] | None = None,
        generator: torch.Generator | None = None,
    ) -> LatentBound:
        """Estimate the strict bound on ``-log p(x0)`` of the chain on a path, sequence by sequence.

        That of a continuous latent is of the chain with DDPM's steps, the default ones. On the
        default path it is that of :attr:`order`, where there is one.

        :param x0: clean tokens, int64 ``(n, L)``.
        :param path: the default path if None.
        :param num_samples: independent repetitions, whose spread is the standard error.
        :param num_steps: steps that are scored in each; None for all, which has the least noise,
            fewer are drawn stratified.
        :param surrogate: ``"mse"`` for the published training loss instead, which is no bound.
        :raises TypeError: if it is no path: an average over independent clocks bounds nothing.
        """
        path = self.path if path is None else path
        if not isinstance(path, Path):
            raise TypeError(
                f"{self.name}: a bound is that of the chain on one Path, got {path!r}; what is "
                "averaged over independent levels of tokens and latent bounds no model (that is "
                "loss(free_share=1))."
            )
        if surrogate is not None:
            return published_surrogate(
                self, x0, path, surrogate=surrogate, num_samples=num_samples, generator=generator
            )
        return path_bound(
            self,
            x0,
            path,
            num_samples=num_samples,
            num_steps=num_steps,
            order=self._order_on(path),
            generator=generator,
        )

    @torch.no_grad()
    def bound_terms(
        self, x0: Tensor, *, num_times: int = 64, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw terms whose mean over the first axis bounds ``-log p(x0)`` from above.

        The bound is that of the chain on the default path. Each term scores a step of it, one from
        each of ``num_times`` equal strata, and holds all that no step decides.

        :param x0: clean tokens, int64 ``(n, L)``.
        :param num_times: terms, and network rows, per sequence.
        :returns: nats, float64 ``(num_times, n)``.
        """
        encoding = self.encoding(x0)
        steps = drawn_steps(self.path, x0, num_times, generator)
        order = self._order_on(self.path)
        terms = path_terms(self, x0, encoding, self.path, steps, generator, order)
        whole = (terms.tokens + terms.latent) * self.path.num_steps
        return whole + constant_cost(self, encoding, self.path)

    def loss(
        self,
        batch: Tensor,
        *,
        labels: Tensor | None = None,
        label_dropout: float = 0.1,
        generator: torch.Generator | None = None,
        free_share: float = 0.0,
    ) -> Tensor:
        """Estimate the mean continuous-time bound of SEQ on a batch, one pair of levels per row.

        The encoder gets no gradient: what trains it has its own objective.

        :param batch: clean tokens, int64 ``(n, L)``.
        :param labels: refused: the network knows no classes.
        :param free_share: share of the rows that are at independent levels of tokens and latent,
            which trains what other paths than SEQ read; the loss is then no bound.
        :returns: nats per sequence, a differentiable float64 scalar.
        """
        if labels is not None:
            self._check_labels(labels, (len(batch),))
        return training_loss(self, batch, free_share=free_share, generator=generator)

    # Paths.

    def path_costs(
        self,
        sequences: Tensor,
        *,
        grid: tuple[int, int] = (8, 8),
        num_draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> PathCosts:
        """Estimate what the steps of paths cost, on held-out sequences.

        :param sequences: int64 ``(n, L)``.
        :param grid: numbers of equal intervals of token levels and of latent levels.
        :param num_draws: draws of noise per sequence, the same at all points of the grid.
        """
        return estimate_costs(self, sequences, grid=grid, num_draws=num_draws, generator=generator)

    def propose_path(
        self,
        sequences: Tensor,
        *,
        evaluations: int,
        grid: tuple[int, int] = (8, 8),
        num_draws: int = 1,
        min_gain: float = 1e-9,
        generator: torch.Generator | None = None,
    ) -> Path:
        """Return the path of least estimated bound under a budget of network evaluations.

        What its steps still lose is :func:`~ppl_diffusion.models.path_search.total_correlation` of
        :meth:`path_costs`.

        :param sequences: held-out sequences, int64 ``(n, L)``.
        :param evaluations: budget, one per step.
        :param grid: numbers of equal intervals of token levels and of latent levels.
        :param min_gain: nats that a path must gain over one of fewer steps: the costs are estimates
            whose noise a search finds.
        """
        costs = self.path_costs(sequences, grid=grid, num_draws=num_draws, generator=generator)
        return best_path(costs, evaluations, min_gain=min_gain)

    def learn_order(
        self,
        sequences: Tensor,
        *,
        token_steps: int = 2,
        latent_steps: int | None = None,
        steps: int = 500,
        learning_rate: float = 0.1,
        batch_size: int = 128,
        draws: int = 4,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Return the prior on SEQ with a learned order of its tokens, around the same network.

        Tokens that depend on each other, the codes being known, are then drawn one after the other.
        Nothing but the order is learned, by unbiased gradients of the bound (Adam).

        :param sequences: clean tokens, int64 ``(n, L)``; few of them are fitted by heart.
        :param token_steps: steps that draw tokens, 2 or more.
        :param latent_steps: steps that draw codes; one per slot if None.
        :param steps: of learning, each of which costs ``batch_size * draws`` network rows.
        :param learning_rate: of Adam, in logits.
        :param batch_size: sequences of a step.
        :param draws: noised states per sequence; from two on they are each other's baseline.
        :param generator: source of randomness, on the device of the sequences.
        :raises CapabilityError: if the latent is no codes, or there is no encoder.
        :raises ValueError: if these are no clean sequences, or a number cannot be used.
        """
        slots = self.latent.num_slots
        path = Path.sequential(slots if latent_steps is None else latent_steps, token_steps)
        order = fitted_order(
            self,
            sequences,
            path,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            draws=draws,
            generator=generator,
        )
        program = copy.copy(self)
        program.path, program.order = path, order
        return program

    # Files.

    def save(self, directory: str | Folder) -> None:
        """Write network, order and ``program.json``; the encoder must be the network's own.

        :raises TypeError: if it is not, or the network cannot be saved.
        """
        if self.encoder is not None:
            raise TypeError(
                f"{self.name}: an encoder outside the network cannot be saved; make it the "
                "network's own, or save it yourself."
            )
        super().save(directory)
        if self.order is not None:
            write_order(self.order, directory)

    def settings(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs besides the network, as JSON knows it."""
        process, entries = self.latent_process, super().settings()
        own = process.schedule
        entries["latent_schedule"] = own if isinstance(own, str) else schedule_entry(own)
        if isinstance(process, Gaussian):
            entries["t_min"] = process.t_min
        if self.order is not None:  # left out otherwise: folders of before stay as they are
            entries["order"] = ORDER_FILE
        return entries | {"path": [list(pair) for pair in self.path.levels]}

    @classmethod
    def restore(cls, directory: str | Folder, **settings: Any) -> Self:
        """Read back what :meth:`save` wrote, in evaluation mode and without gradients."""
        own = settings.get("latent_schedule")
        if isinstance(own, list):
            settings["latent_schedule"] = read_schedule(own, directory)
        if "path" in settings:
            settings["path"] = Path(settings["path"])
        if "order" in settings:
            settings["order"] = read_order(directory)
        return super().restore(directory, **settings)


def _latent_process(
    spec: LatentSpec, schedule: Schedule | str | None, t_min: float | None
) -> Absorbing | Gaussian:
    if spec.num_codes is None:
        return Gaussian(schedule or "sqrt", 0.1 if t_min is None else t_min)
    if isinstance(schedule, str) or t_min is not None:
        raise ValueError(
            "LatentDiffusion: codes are hidden, by a Schedule such as Linear(), and their chain "
            "ends at no noise; names of Gaussian schedules and t_min are for vectors."
        )
    return Absorbing(spec.num_codes, schedule or Linear())
