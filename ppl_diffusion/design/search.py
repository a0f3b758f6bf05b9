"""How hard, and by which inference program, a design run looks."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ppl_diffusion.design.checks import InputError, at_least, finite, one_of, positive

TWISTS = ("argmax", "persistent", "sample", "none")
RESAMPLERS = ("multinomial", "residual", "stratified", "systematic", "ssp", "killing")
KINDS = ("difference", "max", "sum", "add")
RANDOM_FILLS = ("persistent", "sample")
NUM_FILLS = 4
REWEIGHTED_FILLS = 16
"""Completions a reweighted proposal learns from, where nothing is said."""

_PARTICLES = {"resampler": "systematic", "ess_threshold": 0.5}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "smc": {"twist": "persistent", **_PARTICLES},
    "soft-value": {"children": 4, "alpha": 1.0, "weighted": True, "twist": "argmax", **_PARTICLES},
    "steering": {"kind": "difference", "every": 1, "twist": "argmax", **_PARTICLES},
    "twisted": {"twist": None, **_PARTICLES},
    "corrector": {"power": 1.0, "twist": "argmax", **_PARTICLES},
    "best-of-n": {"keep": 1},
}
"""The options of each method, with what they are if nothing is said."""
_FLAGS = {"weighted": "--unweighted"}


@dataclass(frozen=True)
class Search:
    """How hard to look, and how. Options a method does not have are None; those it has get its
    own defaults.

    :param num_particles: particles per run.
    :param num_runs: independent runs, for the error bar of the evidence.
    :param num_steps: steps of the reverse chain; methods that reveal a given number of bases at a
        time reveal as many as end within so many steps.
    :param seed: seed of every random number.
    :param method: one of :data:`METHODS`.
    :param twist: look-ahead of the potential at unfinished sequences, or ``"none"``.
    :param fills: completions per particle of a random look-ahead.
    :param resampler: resampling scheme.
    :param ess_threshold: resample when the effective sample size falls below this share.
    :param children: children per lineage and step.
    :param alpha: temperature of the choice among children.
    :param weighted: pay for that choice.
    :param kind: how scores become weights.
    :param every: score at every so many steps.
    :param power: exponent of the prior in the target.
    :param keep: draws kept per run.
    :raises InputError: if a number or a name cannot be used, or an option is not the method's.
    """

    num_particles: int = 64
    num_runs: int = 4
    num_steps: int = 64
    seed: int = 0
    method: str = "smc"
    twist: str | None = None
    fills: int | None = None
    resampler: str | None = None
    ess_threshold: float | None = None
    children: int | None = None
    alpha: float | None = None
    weighted: bool | None = None
    kind: str | None = None
    every: int | None = None
    power: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("num_particles", 2), ("num_runs", 1), ("num_steps", 1), ("seed", 0)):
            at_least(name.replace("num_", "the number of "), getattr(self, name), low)
        one_of("method", self.method, METHODS)
        self._require_own_options()
        self._check_unweighted()
        if self.fills is not None and self.twist is None:
            object.__setattr__(self, "twist", "persistent")
        defaults = METHODS[self.method]
        for name in defaults if self.weighted is not False else set(defaults) - set(_PARTICLES):
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults[name])
        self._check_fills()
        self._check_particles()
        self._check_options()

    def settings(self) -> dict[str, Any]:
        """:returns: everything that decides the result, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _require_own_options(self) -> None:
        known = {name for method in METHODS for name in _own(method)}
        for name in sorted(known - _own(self.method)):
            if getattr(self, name) is not None:
                owners = [method for method in METHODS if name in _own(method)]
                raise InputError(
                    f"The option {_flag(name)} is no option of {self.method}: drop it, or choose "
                    f"--method {' or '.join(owners)}."
                )

    def _check_unweighted(self) -> None:
        if self.weighted is False and (self.resampler, self.ess_threshold) != (None, None):
            raise InputError(
                "With --unweighted nothing is ever resampled: drop --resampler and --ess-threshold."
            )

    def _check_fills(self) -> None:
        if self.twist in RANDOM_FILLS:
            object.__setattr__(self, "fills", NUM_FILLS if self.fills is None else self.fills)
        elif self.fills is not None:
            raise InputError(
                f"--fills counts random completions, and {self.twist} has none: drop it, or choose "
                f"--twist {' or '.join(RANDOM_FILLS)}."
            )

    def _check_particles(self) -> None:
        if self.twist is not None:
            one_of("twist", self.twist, TWISTS)
        if self.resampler is not None:
            one_of("resampler", self.resampler, RESAMPLERS)
        if self.ess_threshold is not None and not 0.0 <= self.ess_threshold <= 1.0:
            raise InputError(
                f"The ESS threshold must be a share between 0 and 1, not {self.ess_threshold}."
            )
        if self.twist == "none" and self.method not in ("smc", "corrector"):
            raise InputError(
                f"The method {self.method} does nothing but look ahead: choose another --twist "
                "than none, or --method smc."
            )

    def _check_options(self) -> None:
        for name in ("fills", "children", "every", "keep"):
            value = getattr(self, name)
            if value is not None:
                at_least(f"the number of {_flag(name)}", value, 1)
        if self.kind is not None:
            one_of("kind of steering", self.kind, KINDS)
        positive("the power of the prior", self.power)
        self._check_alpha()
        if self.keep is not None and self.keep > self.num_particles:
            raise InputError(
                f"Of {self.num_particles} draws per run {self.keep} cannot be kept: "
                "lower --keep, or raise --particles."
            )

    def _check_alpha(self) -> None:
        finite("the temperature --alpha", self.alpha)
        if self.alpha is None or self.alpha > 0:
            return
        if self.alpha < 0:
            raise InputError(f"The temperature --alpha must be at least 0, not {self.alpha}.")
        if self.weighted:
            raise InputError(
                "With --alpha 0 no weight can pay for keeping the best child alone: "
                "add --unweighted, or give an --alpha above 0."
            )


def with_defaults(search: Search, *, masked: bool, fixed: bool) -> Search:
    """Fill in what depends on the prior, and refuse what a method cannot do on it.

    :param search: the search as asked for.
    :param masked: whether the prior is masked.
    :param fixed: whether bases are fixed.
    :raises InputError: if the method has no answer on such a prior.
    """
    if fixed and not masked and search.method in ("twisted", "corrector"):
        raise InputError(
            f"The method {search.method} holds fixed bases on masked priors alone: drop --fix, or "
            "choose another --method."
        )
    if search.method != "twisted":
        return search
    if search.twist == "argmax" and not masked:
        raise InputError(
            "On a uniform prior the method twisted learns from random completions: choose "
            "--twist persistent, or a masked prior."
        )
    if search.twist is not None:
        return search
    if masked:
        return replace(search, twist="argmax")
    return replace(search, twist="persistent", fills=REWEIGHTED_FILLS)


def _own(method: str) -> set[str]:
    options = set(METHODS[method])
    return options | {"fills"} if "twist" in options else options


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")
