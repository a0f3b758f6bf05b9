"""What the options of the command change in a brief."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ppl_diffusion.designs.question import Job
from ppl_diffusion.designs.reward_spec import OBSERVATION_SD, RewardSpec, read_reward
from ppl_diffusion.jobs.checks import InputError, finite, positive


@dataclass(frozen=True)
class Asked:
    """Options of the command line that are about the target; None and nothing change nothing.

    :param observe: a measurement of the score of the brief's oracle, ``Normal(oracle(x), sd)``.
    :param sd: its standard deviation.
    :param temperature: of every reward that has one.
    :param expression: whether the rewards of the brief stay.
    :param rewards: further rewards, and motifs.
    :param label: class, and ``guidance`` its weight; ``lengths`` the range of them.
    :param gc: share of G and C, in place of that of the brief; ``forbid`` and ``fix`` are added.
    """

    observe: float | None = None
    sd: float | None = None
    temperature: float | None = None
    expression: bool = True
    rewards: tuple[RewardSpec, ...] = ()
    gc: tuple[float, float] | None = None
    forbid: tuple[str, ...] = ()
    fix: tuple[tuple[int, str], ...] = ()
    lengths: tuple[int, int] | None = None
    label: str | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        finite("the observed expression", self.observe)
        positive("the standard deviation of the observation", self.sd)
        positive("the temperature of the reward", self.temperature)
        if self.sd is not None and self.observe is None:
            raise InputError(
                f"--sd {self.sd:g} is the deviation of an observation, and none is given: add "
                "--observe, or drop --sd."
            )
        if self.observe is not None and self.temperature is not None:
            raise InputError(
                "An observed expression and a reward temperature are two different questions: "
                "give --observe or --temperature, not both."
            )
        asked = self.observe is not None or self.temperature is not None
        if asked and not self.expression and not self.rewards:
            raise InputError("--no-expression contradicts --observe and --temperature: drop one.")

    def change(self, job: Job) -> Job:
        """Return a job with these options.

        :raises InputError: if it has no score that an option is about.
        """
        known = self._rewards(job) if self.expression else ()
        question = job.question
        return job.asking(
            rewards=(*known, *map(self._tempered, self.rewards)),
            gc=self.gc or question.gc,
            forbid=(*question.forbid, *(x for x in self.forbid if x not in question.forbid)),
            fix=(*question.fix, *(x for x in self.fix if x not in question.fix)),
            lengths=self.lengths or question.lengths,
            label=question.label if self.label is None else self.label,
            guidance=question.guidance if self.guidance is None else self.guidance,
        )

    def _rewards(self, job: Job) -> tuple[RewardSpec, ...]:
        rewards = job.question.rewards
        if self.observe is not None:
            oracles = [spec for spec in rewards if spec.source == "oracle"]
            if len(oracles) != 1:
                raise InputError(
                    f"The prior {job.name!r} has no expression oracle: ask for --reward, --motif, "
                    "--gc, --forbid or --fix instead of --observe."
                )
            seen = oracles[0].observing(self.observe, self.sd or OBSERVATION_SD)
            return tuple(seen if spec is oracles[0] else spec for spec in rewards)
        if self.temperature is None:
            return rewards
        if not any(map(_has_temperature, (*rewards, *self.rewards))):
            raise InputError(
                f"The prior {job.name!r} has no expression oracle and no other reward: ask for "
                "--reward, or drop --temperature."
            )
        return tuple(map(self._tempered, rewards))

    def _tempered(self, spec: RewardSpec) -> RewardSpec:
        if self.temperature is None or not _has_temperature(spec):
            return spec
        return spec.at_temperature(self.temperature)


def _has_temperature(spec: RewardSpec) -> bool:
    return spec.source != "motif" and spec.between is None and spec.observed is None


def parse_reward(text: str, source: str) -> RewardSpec:
    """Read ``WHERE[,KEY=VALUE...]``, such as ``my_scores:gc_pull,temperature=0.2,goal=minimise``.

    :param source: ``"python"`` or ``"torch"``.
    :raises InputError: if a key is unknown or a value cannot be read.
    """
    at, *pairs = text.split(",")
    entry: dict[str, object] = {source: at.strip()}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(
                f"Cannot read {pair!r} of the reward {text!r}: write KEY=VALUE, such as "
                "temperature=0.2."
            )
        entry[key.strip()] = _value(value.strip())
    return read_reward(entry, f"Reward {text!r}")


def parse_command(command: str, spec: RewardSpec | None = None) -> RewardSpec:
    """Return the reward of a program that reads sequences."""
    made = read_reward({"command": command}, f"Reward {command!r}")
    return made if spec is None else replace(made, temperature=spec.temperature)


def _value(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)
