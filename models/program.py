"""What every model program shares: a denoiser, its process, and the letters of its tokens."""

from __future__ import annotations

import copy
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import pyro
import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.checks import check_denoiser
from ppl_diffusion.denoisers.conditional import Guided, Labelled
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_from_hidden
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Kernel, Linear, Padded, Uniform
from ppl_diffusion.kernels.psi import PsiSchedule
from ppl_diffusion.models.cards import PROGRAM_FILE
from ppl_diffusion.models.words import are_words, join_tokens, split_word
from ppl_diffusion.processes import nelbo_terms
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.processes.schedules import Schedule
from ppl_diffusion.tokenisers import Tokeniser

FAMILIES: dict[str, type[DiffusionProgram]] = {}
"""Every family of model programs whose module has been imported, by name."""
# Keeps log(1 - alpha) and 1 / alpha finite at a cost far below the noise of any bound.
_TIME_MARGIN = 1e-6
_MANY = 50


class DiffusionProgram(ABC):
    """A prior over sequences of fixed length, as a Pyro program.

    Calling it samples one site, ``"path"``, and returns the clean sequence; :meth:`chain` is the
    law of that site, to be used in larger programs.

    A family is a subclass that says what its forward process is. It is known by its class variable
    ``family`` (by default the name of the class), and what it saves is read back as that class
    wherever the module that defines it was imported. One with a network of its own sets ``network``
    to a class with ``save_pretrained`` and ``from_pretrained``; one whose constructor takes more
    arguments adds them to :meth:`settings`.

    :param vocabulary: one symbol per token, in the order of the ids.
    :param length: number ``L`` of tokens of a sequence, of the longest one where lengths differ.
    :param schedule: signal schedule (linear by default). Trained bounds do not depend on it.
    :param lengths: probabilities of the lengths 0 to ``L``, where sequences have several: the last
        symbol then only fills them up, and the length is drawn with the noisiest state
        (:class:`~ppl_diffusion.processes.Padded`).
    :param tokeniser: how text becomes tokens and tokens text; by default letters are letters, and
        symbols of several characters words.
    :param classes: names of the labels that the network knows, in the order of their numbers.
    :raises ValueError: if the vocabulary does not fit the denoiser or has repeated symbols.
    :raises CapabilityError: if lengths are given to a family that does not mask.

    :cvar family: name of the family, written into saved folders.
    :cvar network: class of the denoisers that can be saved.
    :cvar config: its shape.
    :ivar given: what the denoiser is told besides tokens and time; empty if nothing.
    """

    family: ClassVar[str]
    network: ClassVar[Any] = Transformer
    config: ClassVar[Any] = TransformerConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Never the parent's name: what a subclass saves must come back as that subclass.
        cls.family = vars(cls).get("family", cls.__name__)
        known = FAMILIES.get(cls.family, cls)
        # The same class again is a reloaded module or a notebook cell that ran twice.
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.__module__}.{cls.__qualname__}: the family {cls.family!r} is taken by "
                f"{known.__module__}.{known.__qualname__}; choose another name."
            )
        FAMILIES[cls.family] = cls

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        vocabulary: Sequence[str],
        length: int,
        name: str = "prior",
        schedule: Schedule | None = None,
        lengths: Sequence[float] | None = None,
        tokeniser: Tokeniser | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.denoiser = denoiser
        self.tokeniser, self.classes = tokeniser, tuple(classes)
        self.vocabulary = list(vocabulary)
        self.length = int(length)
        self.name = name
        self.given: dict[str, Tensor] = {}
        self._conditional: Labelled | None = None
        self._index = {symbol: i for i, symbol in enumerate(self.vocabulary)}
        if not len(self._index) == len(self.vocabulary) == denoiser.vocab_size:
            raise ValueError(
                f"{type(self).__name__}: the vocabulary has {len(self.vocabulary)} symbols, of "
                f"which {len(self._index)} differ, but the denoiser predicts "
                f"{denoiser.vocab_size}; give one distinct symbol per token."
            )
        self.process = self.make_process(denoiser.vocab_size, schedule or Linear())
        if lengths is not None:
            self.process = self._padded(lengths)

    def _padded(self, lengths: Sequence[float]) -> Padded:
        if type(self.process) is not Absorbing:
            raise CapabilityError(
                f"{self.name}: sequences of several lengths are masked, and {self.family!r} makes "
                f"other noise ({self.process!r}); use a masked prior, or cut them to one length."
            )
        if len(lengths) != self.length + 1:
            raise ValueError(
                f"{self.name}: lengths must hold the probabilities of the lengths 0 to "
                f"{self.length}, got {len(lengths)} numbers."
            )
        process = Padded(self.process.vocab_size, lengths, self.process.schedule)
        check_denoiser(process, self.denoiser)
        return process

    @property
    def padding(self) -> str | None:
        """The symbol that fills short sequences up, None where all have one length."""
        return None if self.process.padding is None else self.vocabulary[self.process.padding]

    def between(self, low: int, high: int | None = None) -> Self:
        """Return the prior of sequences whose lengths lie in a range, around the same network.

        :param low: fewest tokens of a sequence.
        :param high: most of them; those of the longest one if it is not given.
        :raises CapabilityError: if all sequences have one length.
        :raises ValueError: if the prior knows none of these lengths.
        """
        if not isinstance(self.process, Padded):
            raise CapabilityError(
                f"{self.name}: all sequences have {self.length} tokens; train a prior on sequences "
                "of several lengths."
            )
        program = copy.copy(self)
        program.process = self.process.between(low, high)
        return program

    @staticmethod
    @abstractmethod
    def make_process(vocab_size: int, schedule: Schedule) -> Process:
        """Return the forward process of this family."""

    @classmethod
    def build(
        cls,
        vocabulary: Sequence[str],
        length: int,
        *,
        name: str = "prior",
        lengths: Sequence[float] | None = None,
        tokeniser: Tokeniser | None = None,
        classes: Sequence[str] = (),
        **shape: Any,
    ) -> Self:
        """Make an untrained program around a transformer, ready to be trained (dropout is on).

        :param lengths: probabilities of the lengths, where there are several; the last symbol of
            the vocabulary then only fills sequences up.
        :param shape: fields of :attr:`config`, a
            :class:`~ppl_diffusion.denoisers.config.TransformerConfig` unless a family says
            otherwise, that the vocabulary and the length do not decide.
        """
        states = cls.make_process(len(vocabulary), Linear()).num_states
        shape = shape if lengths is None else {**shape, "num_padding": 1}
        config = cls.config(len(vocabulary), states, length, **shape)
        made: dict[str, Any] = {"name": name, "lengths": lengths, "tokeniser": tokeniser}
        made["classes"] = classes or None
        made = {key: value for key, value in made.items() if value is not None}
        return cls(cls.network(config), vocabulary=vocabulary, length=length, **made)

    @classmethod
    def starting_from(cls, prior: DiffusionProgram, **shape: Any) -> DiffusionProgram:
        """Return the program whose training goes on from a prior: here the prior itself.

        :param prior: read from its folder; the caller checks that it suits the data.
        :param shape: what a recipe says of the network.
        """
        return prior

    def train(self, mode: bool = True) -> Self:
        """Switch the network between training and use, in place, and return the program.

        What :meth:`build` returns is to be trained; what was loaded is to be used.
        """
        if isinstance(self.denoiser, torch.nn.Module):
            self.denoiser.train(mode)
        return self

    def eval(self) -> Self:
        """Switch dropout and the like off; see :meth:`train`."""
        return self.train(False)

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps of the only chain there is, None where any number will do."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the network lives; the CPU if it has no parameters."""
        parameters = getattr(self.denoiser, "parameters", tuple)
        return next((p.device for p in parameters()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Self:
        """Move the network, in place as torch does, and return the program.

        :raises CapabilityError: if the denoiser cannot be moved.
        """
        if not hasattr(self.denoiser, "to"):
            raise CapabilityError(
                f"{self.name}: a {type(self.denoiser).__name__} has no method `to`; build it with "
                f"tensors on {device} instead."
            )
        self.denoiser.to(device)
        return self

    @property
    def separator(self) -> str:
        """What stands between tokens in text: nothing between letters, a space between words."""
        return " " if are_words(self.vocabulary) else ""

    def encode(self, text: str | Sequence[str] | Sequence[Sequence[str]]) -> Tensor:
        """Turn text into token ids, ``(L,)`` for one sequence and ``(n, L)`` for several.

        A tokeniser splits text where the prior has one. Otherwise every character is a token where
        tokens are letters; where they have several characters, text is split at white space, and a
        word that is no token into pieces, the longest first, of which all but the first are written
        ``##piece`` in the vocabulary. What is short is filled up where lengths differ.

        :param text: a text or a list of tokens for one sequence, a list of either for several.
        :raises ValueError: if a length, a letter or a token is wrong.
        """
        one = isinstance(text, str)
        members: list[Any] = [text] if isinstance(text, str) else list(text)
        if not one and self._is_one_sequence(members):
            one, members = True, [members]
        rows = [self._ids(row) for row in members]
        ids = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return ids[0] if one else ids.reshape(len(rows), self.length)

    def decode(self, ids: Tensor) -> str | list[str]:
        """Turn token ids, int64 ``(L,)`` or ``(n, L)``, into one string or a list of them.

        Tokens are joined by the tokeniser or :attr:`separator`, and pieces ``##piece`` to what is
        before them; what fills sequences up is left out.

        :raises ValueError: if the shape is wrong or an id is not a clean token.
        """
        if ids.ndim not in (1, 2) or ids.shape[-1] != self.length:
            raise ValueError(
                f"{self.name}: decode reads ids of shape ({self.length},) or (n, {self.length}), "
                f"but was given {tuple(ids.shape)}; flatten the leading dimensions first."
            )
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < len(self.vocabulary)):
            raise ValueError(
                f"{self.name}: decode reads ids 0 to {len(self.vocabulary) - 1}, but was given "
                f"{int(ids.min())} to {int(ids.max())}; an id beyond the vocabulary is a mask."
            )
        flat = ids.reshape(-1, self.length).tolist()
        filling = self.process.padding
        rows = [self._joined([self.vocabulary[i] for i in row if i != filling]) for row in flat]
        return rows[0] if ids.ndim == 1 else rows

    def _joined(self, tokens: list[str]) -> str:
        if self.tokeniser is not None:
            return self.tokeniser.join(tokens)
        return join_tokens(tokens, self.separator)

    def chain(
        self,
        num_steps: int | None = None,
        *,
        kappa: float = 1.0,
        psi: PsiSchedule | None = None,
        prompt: Tensor | None = None,
    ) -> ReverseChain:
        """Return the law of the reverse path, event shape ``(num_steps + 1, L)``.

        Other kernels (first hitting, guidance, ...) are built around :attr:`process` and
        :attr:`denoiser`, or by name with :func:`~ppl_diffusion.models.make_chain`.

        :param num_steps: number ``T`` of reverse steps, 64 unless ``psi`` says otherwise.
        :param kappa: Psi parameter of the kernel; 1 is ancestral sampling.
        :param psi: or a Psi schedule, with its own number of steps.
        :param prompt: int64 ``(L,)``, tokens that are there from the start, -1 elsewhere.
        """
        steps = 64 if num_steps is None and psi is None else num_steps
        kernel = InterpolatingKernel(
            self.process, self.denoiser, num_steps=steps, kappa=kappa, psi=psi
        )
        return self.around(kernel, prompt=prompt)

    def around(self, kernel: Kernel, *, prompt: Tensor | None = None) -> ReverseChain:
        """Return the chain of any kernel around :attr:`process` and :attr:`denoiser`."""
        prompt = None if prompt is None else torch.as_tensor(prompt, device=self.device)
        known: dict[str, Any] = {"given": self.given} if self.given else {}
        return ReverseChain(kernel, self.length, prompt=prompt, **known)

    def __call__(self, num_steps: int = 64) -> Tensor:
        """Sample the site ``"path"`` and return its clean sequence, int64 ``(L,)``."""
        chain = self.chain(num_steps)
        return chain.x0(pyro.sample("path", chain))

    @overload
    def labelled(self, label: int | None) -> Labelled: ...
    @overload
    def labelled(self, label: Tensor) -> Self: ...
    def labelled(self, label: int | Tensor | None) -> Labelled | Self:
        """Return the denoiser of one class, or the prior given labels drawn before its sequences.

        A number, or None for no class, gives a denoiser for guidance without a classifier. A tensor
        gives a program around the same network, whose chains carry the labels with their states and
        have them as their batch: ``prior.labelled(pyro.sample("label", ...)).chain(8)``.

        :param label: a class ``0..num_classes-1``, None, or int64 ``(*batch,)`` of classes.
        :raises CapabilityError: if the network knows no classes.
        :raises ValueError: if it does not know these.
        """
        if not isinstance(label, Tensor):
            return Labelled(self.denoiser, label)
        self._check_labels(label, tuple(label.shape))
        if self._conditional is None:
            given: Any = "given"
            self._conditional = Labelled(self.denoiser, given)
        program = copy.copy(self)
        # One object for all labels: kernels know laws apart by the identity of their denoisers.
        program.denoiser, program.given = self._conditional, {"label": label.to(self.device)}
        return program

    def of_class(self, label: str | int, weight: float = 1.0) -> Self:
        """Return the prior of one class, by classifier-free guidance around the same network.

        :param label: a name out of :attr:`classes`, or a number.
        :param weight: ``w`` of ``p_w ~ p(x | label)**w p(x)**(1 - w)``, prediction by prediction: 1
            is the conditional prior, above 1 overshoots.
        :raises CapabilityError: if the network knows no classes.
        :raises ValueError: if there is none of that name.
        """
        number = self._class_number(label)
        program = copy.copy(self)
        conditional = Labelled(self.denoiser, number)
        program.denoiser = conditional
        if weight != 1.0:
            mask = self.process.mask_id
            free = Labelled(self.denoiser, None)
            program.denoiser = Guided(conditional, free, weight, mask_id=mask)
        return program

    def _class_number(self, label: str | int) -> int:
        if str(label) in self.classes:
            return self.classes.index(str(label))
        number = int(label) if isinstance(label, int) or str(label).isdecimal() else -1
        known = int(getattr(self.denoiser, "num_classes", 0))
        if known and not 0 <= number < known:
            names = ", ".join(self.classes) or f"0 to {known - 1}"
            raise ValueError(f"{self.name}: there is no class {label!r}; choose one of {names}.")
        return number

    def loss(
        self,
        batch: Tensor,
        *,
        labels: Tensor | None = None,
        label_dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Estimate the mean continuous-time NELBO of a batch, one time per row.

        The times are stratified over the batch (low discrepancy: MDLM, arXiv 2406.07524, section
        3.5), each stratum given to a random row. Where noise is no mask they are squares of
        stratified uniforms, weighted accordingly, as in :meth:`bound_terms`: that halved the
        variance of the gradient on text. (A masked loss is flat in time: plain times are best.)

        :param batch: clean tokens, int64 ``(n, L)``.
        :param labels: classes of the rows, int64 ``(n,)``, for a network with ``num_classes``.
        :param label_dropout: share of the labels that are withheld, so that one network learns the
            conditional and the unconditional prior (Ho and Salimans 2022, arXiv 2207.12598).
        :returns: nats per sequence, a differentiable float64 scalar.
        """
        given = self.given
        if labels is not None:
            given = {"label": self._withheld(labels, len(batch), label_dropout, generator)}
        roots = stratified_times(batch, generator=generator)
        if self.process.absorbing:
            terms = self._terms(batch, roots, generator, given)
            return (terms - self.process.log_length(batch)).mean()
        return (2.0 * roots * self._terms(batch, roots.square(), generator, given)).mean()

    def _withheld(
        self, labels: Tensor, rows: int, share: float, generator: torch.Generator | None
    ) -> Tensor:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{self.name}: label_dropout must lie in [0, 1], got {share}.")
        null = self._check_labels(labels, (rows,))
        source = _source(labels.device, generator)
        drawn = torch.rand(labels.shape, generator=generator, device=source).to(labels.device)
        return torch.where(drawn < share, null, labels)

    def _check_labels(self, labels: Tensor, shape: tuple[int, ...]) -> int:
        """Refuse labels that the network does not know; return the one that means none."""
        classes = int(getattr(self.denoiser, "num_classes", 0))
        if not classes:
            raise CapabilityError(
                f"{self.name}: labels were given, but the network knows no classes; build it with "
                "num_classes."
            )
        whole = isinstance(labels, Tensor) and labels.dtype == torch.int64
        fitting = whole and labels.shape == shape
        if not fitting or not bool(((labels >= 0) & (labels < classes)).all()):
            raise ValueError(
                f"{self.name}: labels must be int64 of shape {shape}, one class in "
                f"0..{classes - 1} each; convert or mend them."
            )
        return classes

    def require_clean(self, x0: Tensor) -> None:
        """:raises ValueError: if these are no clean sequences, int64 ``(n, L)``."""
        size = len(self.vocabulary)
        fits = x0.ndim == 2 and x0.shape[1] == self.length and x0.dtype == torch.int64
        if not fits or not bool(((x0 >= 0) & (x0 < size)).all()):
            raise ValueError(
                f"{self.name}: clean sequences are int64 ids 0 to {size - 1} of shape "
                f"(n, {self.length}), got {x0.dtype} of shape {tuple(x0.shape)}"
                f"{f' with {int(x0.min())} to {int(x0.max())}' if x0.numel() else ''}; encode() "
                "makes them from text."
            )

    @torch.no_grad()
    def bound_terms(
        self, x0: Tensor, *, num_times: int = 64, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw terms whose mean over the first axis bounds ``-log p(x0)`` from above.

        The bound is that of the continuous-time limit, ``num_steps`` to infinity. Times are squares
        of stratified uniforms, weighted accordingly: the integrand grows like ``1 / t`` on an event
        of probability ``t``, so uniform times would have infinite variance. Neighbouring terms lie
        in neighbouring strata; the plain spread over the first axis overstates the error.

        :param x0: clean tokens, int64 ``(n, L)``.
        :param num_times: terms, and network rows, per sequence.
        :returns: nats, float64 ``(num_times, n)``.
        """
        strata = torch.arange(num_times, device=x0.device)[:, None].expand(num_times, len(x0))
        roots = _stratified(strata, num_times, generator)
        terms = [self._terms(x0, root.square(), generator, self.given) for root in roots]
        return 2.0 * roots * torch.stack(terms) - self.process.log_length(x0)

    def _terms(
        self,
        x0: Tensor,
        times: Tensor,
        generator: torch.Generator | None,
        given: Mapping[str, Tensor],
    ) -> Tensor:
        t = times[:, None]
        u = uniforms((2, *x0.shape), generator=generator, device=x0.device)
        z = self.process.corrupt(x0, self.process.schedule.alpha(t), u[0], u[1])
        return self._bound_at(x0, z, t, given).sum(-1)

    def _bound_at(self, x0: Tensor, z: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        network, schedule = self.denoiser, self.process.schedule
        if isinstance(self.process, Uniform) and isinstance(network, Transformer):
            # The same numbers without a table of all logits.
            hidden, slope = network.hidden(z, t[:, 0], **given), schedule.alpha_prime(t)
            head = network.vocabulary  # the bound normalises what it gets
            return uniform_nelbo_from_hidden(hidden, head, x0, z, schedule.alpha(t), slope)
        terms: Tensor = nelbo_terms(self.process, x0, z, network(z, t[:, 0], **given), t)
        return terms

    def save(self, directory: str | Path) -> None:
        """Write the network and ``program.json``, for :func:`ppl_diffusion.models.load` to read.

        :raises TypeError: if the denoiser is not of the class :attr:`network`.
        """
        if not isinstance(self.denoiser, self.network):
            raise TypeError(
                f"{self.name}: only a program around a {self.network.__name__} can be saved, "
                f"this one has a {type(self.denoiser).__name__}."
            )
        self.denoiser.save_pretrained(directory)
        entries = {"family": self.family, **self.settings()}
        text = json.dumps(entries, indent=2, sort_keys=True)
        (Path(directory) / PROGRAM_FILE).write_text(text + "\n", encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs besides the network, as JSON knows it."""
        entries = {"name": self.name, "length": self.length, "vocabulary": self.vocabulary}
        schedule = self.process.schedule
        if schedule != Linear():  # the default is left out: folders of before must stay as they are
            entries["schedule"] = schedule_entry(schedule)
        if isinstance(self.process, Padded):
            entries["lengths"] = self.process.lengths.tolist()
        if self.tokeniser is not None:
            entries["tokeniser"] = self.tokeniser.settings()
        if self.classes:
            entries["classes"] = list(self.classes)
        return entries

    @classmethod
    def restore(cls, directory: str | Path, **settings: Any) -> Self:
        """Read back what :meth:`save` wrote, in evaluation mode and without gradients.

        :param settings: what :meth:`settings` returned.
        :raises ValueError: if the schedule is of a class that was not imported.
        """
        if "schedule" in settings:
            settings["schedule"] = read_schedule(settings["schedule"], directory)
        if "tokeniser" in settings:
            settings["tokeniser"] = Tokeniser.from_settings(settings["tokeniser"])
        return cls(cls.network.from_pretrained(directory).requires_grad_(False), **settings)

    def _is_one_sequence(self, members: Sequence[Any]) -> bool:
        """Whether the members of a list are tokens, not sequences of their own."""
        if self.tokeniser is not None or self.process.padding is not None:
            # A letter may be a whole sequence where lengths differ: a list is of sequences.
            return False
        if self.length == 1 or not all(isinstance(member, str) for member in members):
            return False
        known = [member in self._index for member in members]
        if not self.separator:
            return bool(known) and all(known)
        # A word that is unknown beside known ones is a mistake that its position should name.
        return any(known) and not any(len(member.split()) > 1 for member in members)

    def _ids(self, text: str | Sequence[str]) -> list[int]:
        tokens, what = self._split(text), "tokens" if self.separator else "letters"
        tokens = self._filled(tokens, what)
        if len(tokens) != self.length:
            whole = text if isinstance(text, str) else join_tokens(tokens, self.separator)
            shown = whole if len(whole) <= 20 else whole[:17] + "..."
            raise ValueError(
                f"{self.name}: a sequence has {self.length} {what}, but {shown!r} has "
                f"{len(tokens)}; cut or pad it."
            )
        for position, token in enumerate(tokens):
            if token not in self._index:
                raise ValueError(
                    f"{self.name}: {token!r} at position {position} is not one of the {what} "
                    f"{_listed(self.vocabulary)}; replace it."
                )
        return [self._index[token] for token in tokens]

    def _filled(self, tokens: Sequence[str], what: str) -> Sequence[str]:
        """Return tokens filled up where lengths differ."""
        if not isinstance(self.process, Padded):
            return tokens
        fill, law = self.vocabulary[self.process.padding], self.process.lengths
        letters = list(tokens)
        while letters and letters[-1] == fill:
            letters.pop()
        if fill in letters:
            raise ValueError(
                f"{self.name}: {fill!r} only fills sequences up behind their end, but stands at "
                f"position {letters.index(fill)} of {len(letters)}; leave it out."
            )
        if len(letters) >= law.size or law[len(letters)] == 0:
            known = law.nonzero()[0]
            raise ValueError(
                f"{self.name}: a sequence has {known[0]} to {known[-1]} {what}, but "
                f"{_short(letters)} has {len(letters)}; cut it, or train on such sequences."
            )
        return letters + [fill] * (self.length - len(letters))

    def _split(self, text: str | Sequence[str]) -> Sequence[str]:
        if isinstance(text, str) and self.tokeniser is not None:
            return self.tokeniser.split(text)
        if not isinstance(text, str) or not self.separator:
            return text
        tokens = [token for word in text.split() for token in split_word(word, self._index)]
        # Letters beside one long token, such as one for padding, are still read one by one.
        letters = len(text) == self.length and all(letter in self._index for letter in text)
        return text if letters and not all(token in self._index for token in tokens) else tokens

    def __repr__(self) -> str:
        letters = self.separator.join(self.vocabulary)
        return f"{type(self).__name__}({self.name!r}, vocabulary={letters!r}, length={self.length})"


def schedule_entry(schedule: Schedule) -> list[Any]:
    """Return a schedule as JSON knows it, for :func:`read_schedule`."""
    return [type(schedule).__name__, dataclasses.asdict(schedule)]


def read_schedule(entry: Sequence[Any], directory: str | Path) -> Schedule:
    """Return the schedule of an entry of the prior in a folder.

    :raises ValueError: if it is of a class that was not imported.
    """
    name, fields = entry
    known = {schedule.__name__: schedule for schedule in Schedule.__subclasses__()}
    if name not in known:
        raise ValueError(
            f"The prior in {str(directory)!r} has the schedule {name!r}, none of "
            f"{', '.join(known)}; import the module that defines it."
        )
    return known[name](**fields)


def stratified_times(rows: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one time per row, one from each of as many strata of ``(0, 1)``, in random order."""
    source = _source(rows.device, generator)
    order = torch.randperm(len(rows), generator=generator, device=source)
    return _stratified(order.to(rows.device), len(rows), generator)


def _source(device: torch.device, generator: torch.Generator | None) -> torch.device:
    return device if generator is None else generator.device


def _stratified(strata: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    jitter = uniforms(strata.shape, generator=generator, device=strata.device)
    return ((strata + jitter) / count).clamp(_TIME_MARGIN, 1.0 - _TIME_MARGIN)


def _short(tokens: Sequence[str]) -> str:
    text = "".join(tokens)
    return repr(text if len(text) <= 20 else text[:17] + "...")


def _shown(letter: str) -> str:
    return letter if letter.isprintable() and letter not in " ," else repr(letter)


def _listed(vocabulary: Sequence[str]) -> str:
    if len(vocabulary) > _MANY and max(map(len, vocabulary)) > 1:
        return f"{', '.join(map(_shown, vocabulary[:_MANY]))} and {len(vocabulary) - _MANY} more"
    return ", ".join(map(_shown, vocabulary))
