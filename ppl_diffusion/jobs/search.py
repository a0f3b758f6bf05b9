"""How hard, and by which inference program, a job looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ppl_diffusion.inference import Method, Refinement, methods
from ppl_diffusion.jobs.backends import TORCH, is_jax
from ppl_diffusion.jobs.checks import InputError, at_least, one_of, positive, usable_device
from ppl_diffusion.jobs.options import (
    DEFAULTS,
    NONE,
    THRESHOLDS,
    options,
    part_of,
    spoken,
    usual,
)
from ppl_diffusion.smc import RESAMPLERS
from ppl_diffusion.smc.twists import FillTwist, PersistentFill, SampledFill

RANDOM_FILLS: dict[str, type[PersistentFill | SampledFill]] = {
    cls.name: cls for cls in (PersistentFill, SampledFill)
}


@dataclass(frozen=True)
class Search:
    """How hard to look, and how.

    :param num_runs: independent runs, for the error bar of the evidence.
    :param num_steps: steps of the reverse chain; methods that reveal a given number of bases at a
        time reveal as many as end within so many steps. None for a step per four positions of a
        masked prior, and 64 elsewhere.
    :param method: name of a registered method.
    :param resampler: resampling scheme; None for the runner's own.
    :param ess_threshold: resample when the effective sample size falls below this share; None for
        the method's own.
    :param device: where to compute; None for the CPU.
    :param backend: who computes: ``"numpyro"``, or None for torch.
    :param spread: whether each run has a seed of its own, so that they can be made in several
        processes; None for side by side in one, with one stream of random numbers.
    :param options: what is asked of the method, by :func:`ppl_diffusion.jobs.options.options`.
    :raises InputError: if a number or a name cannot be used, or an option is not the method's.
    """

    num_particles: int = 72
    num_runs: int = 4
    num_steps: int | None = None
    seed: int = 0
    method: str = "refinement"
    resampler: str | None = None
    ess_threshold: float | None = None
    device: str | None = None
    backend: str | None = None
    spread: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (("num_particles", 2), ("num_runs", 1), ("num_steps", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                at_least(name.replace("num_", "the number of "), getattr(self, name), low)
        self._check_options()
        if "fills" in self.options and "twist" not in self.options:
            # Counting completions says that they are random.
            object.__setattr__(self, "options", {**self.options, "twist": PersistentFill.name})
        self._check_resampling(self.make())
        if self.ess_threshold is None:
            object.__setattr__(self, "ess_threshold", THRESHOLDS.get(self.method))
        if self.device is not None:
            usable_device(self.device)

    @classmethod
    def asked(
        cls, words: Mapping[str, Any], *, device: str = "cpu", backend: str = TORCH, **numbers: Any
    ) -> Search:
        """Return what a command was asked for.

        :param words: the options that come from the registry: ``method``, ``resampler``, and those
            of the method.
        :param device: where to compute.
        :param backend: who computes.
        :param numbers: further fields.
        :raises InputError: if the two do not go together.
        """
        own = {name: words[name] for name in ("method", "resampler") if name in words}
        rest = {name: value for name, value in words.items() if name not in own}
        place = None if device == "cpu" else device
        who = backend if is_jax(backend, device) else None
        return cls(**own, **numbers, device=place, backend=who, options=rest)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        known = {**values, **usual(self.method, self.inner), **self.options}
        if known.get("twist") not in RANDOM_FILLS:
            known.pop("fills", None)
        return {name: value for name, value in known.items() if value is not None}

    @property
    def inner(self) -> str | None:
        """The method that is refined, if one is."""
        if self.method != Refinement.name:
            return None
        given: str = self.options.get("inner", DEFAULTS[self.method]["inner"])
        return given

    def make(self) -> Method:
        """Return the method, with its options.

        :raises InputError: if it refuses them.
        """
        if self.inner is None:
            return self._made(self.method, self.options)
        one_of("method", self.inner, methods())
        # What is refined may have an option of that name, too: its inner loop.
        rest = {name: value for name, value in self.options.items() if name != "inner"}
        inner = self._made(self.inner, rest)
        return self._made(self.method, self.options, inner=inner)

    def _made(self, name: str, chosen: Mapping[str, Any], **more: Any) -> Method:
        cls = methods()[name]
        known = {f.name for f in fields(cls)}
        asked = {**DEFAULTS.get(name, {}), **chosen, **more}
        if "twist" in asked:
            asked["twist"] = self._twist(asked["twist"])
        asked = {key: None if value == NONE else value for key, value in asked.items()}
        try:
            whole = {name: value for name, value in asked.items() if name in known}
            return cls(**whole, **_parts(name, chosen))
        except (ValueError, TypeError) as error:
            raise InputError(spoken(str(error), name)) from error

    def _twist(self, name: str) -> FillTwist | str | None:
        fills: int | None = self.options.get("fills")
        if name in RANDOM_FILLS:
            return RANDOM_FILLS[name]() if fills is None else RANDOM_FILLS[name](fills)
        if fills is not None:
            raise InputError(
                f"--fills counts random completions, and {name} has none: drop it, or choose "
                f"--twist {' or '.join(RANDOM_FILLS)}."
            )
        return None if name == NONE else name

    def _check_options(self) -> None:
        one_of("method", self.method, methods())
        known, asked = options(), {}
        for name, value in self.options.items():
            one_of("option", name, known)
            asked[name] = known[name].read(value, self.method, self.inner)
        object.__setattr__(self, "options", asked)
        if "fills" in self.options:
            at_least("the number of --fills", self.options["fills"], 1)
        positive("the power of the prior", self.options.get("power"))
        keep = self.options.get("keep", 1)
        if isinstance(keep, int) and keep > self.num_particles:
            raise InputError(
                f"Of {self.num_particles} draws per run {keep} cannot be kept: "
                "lower --keep, or raise --particles."
            )

    def _check_resampling(self, method: Method) -> None:
        if self.resampler is not None:
            one_of("resampler", self.resampler, RESAMPLERS)
        if self.ess_threshold is not None and not 0.0 <= self.ess_threshold <= 1.0:
            raise InputError(
                f"The ESS threshold must be a share between 0 and 1, not {self.ess_threshold}."
            )
        asked = [n for n in ("resampler", "ess_threshold") if getattr(self, n) is not None]
        scheme = RESAMPLERS[self.resampler or "systematic"]
        if asked and method.resampling(scheme, 0.5)[1] == 0.0:
            raise InputError(
                f"The option --{asked[0].replace('_', '-')} is no option of {self.method} as it is "
                "asked for, where nothing is ever resampled: drop it."
            )


def _parts(method: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects of options of a method that something is asked of."""
    found: dict[str, dict[str, Any]] = {}
    for option in options().values():
        use = option.owners.get(method)
        if use is not None and use.part is not None and option.name in asked:
            said = asked[option.name]
            found.setdefault(use.part, {})[option.name] = None if said == NONE else said
    usual = {each.name: part_of(each) for each in fields(methods()[method])}
    return {part: replace(usual[part], **values) for part, values in found.items()}
