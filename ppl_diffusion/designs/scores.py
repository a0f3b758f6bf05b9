"""Scores: what a reward or a judge is asked, as tables show it and as the target counts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.designs.alphabet import Alphabet
from ppl_diffusion.designs.digests import digest
from ppl_diffusion.designs.own_rewards import function_options, own_function
from ppl_diffusion.designs.question import split_name
from ppl_diffusion.designs.reward_spec import OBSERVATION_SD, RewardSpec
from ppl_diffusion.jobs.checks import InputError, one_of, user_input
from ppl_diffusion.models import Oracle, load_oracle
from ppl_diffusion.potentials import (
    AbstractPotential,
    Likelihood,
    Motif,
    Reward,
    SequenceFunction,
    between,
    find_motif,
    read_motifs,
)
from ppl_diffusion.potentials.function_options import FunctionOptions
from ppl_diffusion.potentials.transforms import TRANSFORMS, AtMost, Transform

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Score:
    """A reward or a judge, ready to be asked.

    :param spec: what was said about it.
    :param columns: ``tokens (n, L) -> `` its columns of tables by name, each ``(n,)``.
    :param potential: what it adds to the target; None of a judge.
    """

    spec: RewardSpec
    columns: Callable[[Tensor], Columns]
    potential: AbstractPotential | None = None


def make_score(
    spec: RewardSpec, alphabet: Alphabet, device: torch.device, *, judge: bool = False
) -> Score:
    """Load what a reward or a judge names.

    :param device: where networks of ours compute.
    :param judge: whether it is no part of the target.
    :raises InputError: if it cannot be loaded, or does not fit the alphabet.
    """
    with user_input():
        return _MAKERS[spec.source](spec, alphabet, device, judge)


def _oracle(spec: RewardSpec, alphabet: Alphabet, device: torch.device, judge: bool) -> Score:
    if alphabet.nucleic != "DNA" or alphabet.padding is not None:
        raise InputError(
            f"The oracle {spec.at!r} reads the bases ACGT of sequences of one length, and the "
            f"prior writes {''.join(alphabet.vocabulary)}: choose a DNA prior, or another reward."
        )
    oracle: Oracle = load_oracle(spec.at).to(device)

    def columns(tokens: Tensor) -> Columns:
        mean, sd = oracle.predict(tokens)
        return {spec.name: mean.double(), f"{spec.name}_sd": sd.double()}

    if judge:
        return Score(spec, columns)
    return Score(spec, columns, _weighed(spec, _tilt(spec, oracle, {"name": spec.name})))


def _motif(spec: RewardSpec, alphabet: Alphabet, device: torch.device, judge: bool) -> Score:
    if alphabet.nucleic is None:
        raise InputError(
            f"A motif is a matrix of bases, and the prior writes {''.join(alphabet.vocabulary)}: "
            "drop --motif."
        )
    usual = RewardSpec(spec.name, spec.source, spec.at)
    for name in ("goal", "temperature", "between", "observed", "at_most", "transform"):
        if not judge and getattr(spec, name) != getattr(usual, name):
            raise InputError(
                f"The reward {spec.name!r} is a motif, whose log-odds are nats already, and has "
                f"{name}: drop it, and weigh the motif by weight."
            )
    motif = read_motif(spec)
    strands = {"both_strands": alphabet.nucleic == "DNA", "vocabulary": alphabet.as_dna}
    best = motif.potential(**strands)
    potential = None if judge else _weighed(spec, best)
    known = {"probabilities": motif.probabilities}
    spec = dataclasses.replace(spec, digest=digest(repr(motif.sites), known))
    return Score(spec, lambda tokens: {spec.name: best(tokens)}, potential)


def read_motif(spec: RewardSpec) -> Motif:
    """Return the matrix that a reward names.

    :raises InputError: if there is none of that name, or several and no name.
    """
    path, name = split_name(spec.at)
    motifs = read_motifs(path)
    if name is not None:
        return find_motif(motifs, name)
    if len(motifs) > 1:
        raise InputError(
            f"The motif file {str(path)!r} holds {len(motifs)} matrices: choose one with "
            f"FILE@NAME, such as {path.name}@{motifs[0].identifier}."
        )
    return motifs[0]


def _own(spec: RewardSpec, alphabet: Alphabet, device: torch.device, judge: bool) -> Score:
    """A score of the user's: asked once per sequence, by the policy that was chosen for it."""
    function = own_function(spec, alphabet, device)
    options: FunctionOptions = {"name": spec.name, **function_options(spec, function)}  # type: ignore[typeddict-item]
    if judge:
        asked = SequenceFunction(function, worst=None, **options)
        return Score(spec, lambda tokens: {spec.name: asked(tokens)})
    potential = _tilt(spec, function, options)
    return Score(
        spec, lambda tokens: {spec.name: potential.function(tokens)}, _weighed(spec, potential)
    )


def _weighed(spec: RewardSpec, potential: AbstractPotential) -> AbstractPotential:
    return potential if spec.weight == 1 else spec.weight * potential


def _tilt(spec: RewardSpec, function: Any, options: FunctionOptions) -> Reward | Likelihood:
    """Return what a score adds to the target."""
    if spec.observed is not None:
        if spec.transform:
            raise InputError(
                f"The reward {spec.name!r} is observed in its own units, and has a transform: drop "
                "one of them."
            )
        return Likelihood(function, spec.observed, spec.sd or OBSERVATION_SD, **options)
    transform = _transform(spec)
    if spec.between is not None:
        shape = between(*spec.between, spec.sd or OBSERVATION_SD)
        return Reward(function, shape=shape, transform=transform, **options)
    best = spec.goal == "maximise"
    temperature = spec.temperature or 1.0
    return Reward(function, temperature, maximise=best, transform=transform, **options)


def _transform(spec: RewardSpec) -> Transform | None:
    if not spec.transform:
        return None if spec.at_most is None else AtMost(spec.at_most)
    if spec.at_most is not None:
        raise InputError(
            f"The reward {spec.name!r} has at_most and a transform: let the transform be flat "
            "there, and drop at_most."
        )
    entries = dict(spec.transform)
    kind = entries.pop("kind", None)
    one_of("transform", str(kind), TRANSFORMS)
    try:
        return TRANSFORMS[kind](**entries)
    except (TypeError, ValueError) as error:
        raise InputError(f"The transform of reward {spec.name!r} is not usable: {error}") from error


_MAKERS: dict[str, Callable[[RewardSpec, Alphabet, torch.device, bool], Score]] = {
    "oracle": _oracle,
    "motif": _motif,
    "python": _own,
    "torch": _own,
    "command": _own,
}
