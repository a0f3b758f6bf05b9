"""The methods of the accuracy benchmark, with their settings.

A budget ``N`` is the number of sequences a method moves per step: particles, or all children of all
lineages, or all candidates of a beam. So rows of one ``N`` ask for equally many network rows, and
differ in what they ask the potential.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks._cases import Case
from ppl_diffusion.inference import SMC
from ppl_diffusion.smc import PersistentFill, SampledFill

LINEAGES = 4  # of properly weighted soft-value guidance
CHILDREN = 4  # of each survivor of a beam
KAPPA = 16.0  # the safe shrinkage: as many average completions as there are completions


Build = Callable[[Case, int, int], SMC]


@dataclass(frozen=True)
class Method:
    """A row of a table.

    :param name: how tables call it.
    :param build: ``(case, N, R) -> the runner``.
    :param evidence: whether ``log_evidence`` estimates the case's normalising constant.
    :param width: sequences one particle holds at once (completions, children), for batching.
    :param costly: run fewer times.
    """

    name: str
    build: Build
    evidence: bool = True
    width: int = 1
    costly: bool = False


def _program(method: str, **options: Any) -> Build:
    """Give the whole budget to the particles of a method."""
    return lambda case, size, runs: _runner(case, method, size, runs, **options)


def _lineages(lineages: int, **options: Any) -> Build:
    """Divide the budget among so many lineages of soft-value guidance."""
    return lambda case, size, runs: _runner(
        case, "soft-value", lineages, runs, num_children=size // lineages, **options
    )


def _runner(case: Case, method: str, size: int, runs: int, **options: Any) -> SMC:
    shape = {"num_particles": size, "num_runs": runs, "store_path": False, "max_rows": None}
    return SMC(case.target, case.log_potential, method=method, **shape, **options)


BEST_OF_N = Method("best-of-n", _program("best-of-n"), evidence=False)
IMPORTANCE = Method("importance", _program("importance-sampling"))
BOOTSTRAP = Method("bootstrap", _program("smc", twist="argmax"))
BEAM = Method("beam", _program("beam", num_children=CHILDREN), evidence=False)
SVDD = (
    Method("svdd-argmax", _lineages(1, alpha=0.0, weighted=False), evidence=False),
    Method("svdd-soft", _lineages(1, alpha=1.0, weighted=False), evidence=False),
    Method(f"svdd-weighted-{LINEAGES}", _lineages(LINEAGES, twist="argmax")),
)
ARGMAX = Method("argmax", _program("steering", twist="argmax"))
DEFENSIVE = Method("defensive", _program("steering"), width=5)
SAMPLE_1 = Method("sample-1", _program("steering", twist=SampledFill(1)))
SAMPLE_4 = Method("sample-4", _program("steering", twist=SampledFill(4)), width=4)
PERSISTENT_4 = Method("persistent-4", _program("steering", twist=PersistentFill(4)), width=4)
PERSISTENT_16 = Method(
    "persistent-16", _program("steering", twist=PersistentFill(16)), width=16, costly=True
)
MAX_AND_SUM = tuple(
    Method(
        kind if closing == "exact" else f"{kind}-published",
        _program("steering", kind=kind, closing=closing, twist="argmax"),
        evidence=closing == "exact",
    )
    for kind in ("max", "sum")
    for closing in ("exact", "published")
)
CLAMPED_DEFENSIVE = Method("clamped-defensive", _program("twisted"), width=4)
CLAMPED_ARGMAX = Method("clamped-argmax", _program("twisted", twist="argmax"), width=4)
CLAMPED_SAMPLE = tuple(
    Method(
        f"clamped-sample-{fills}",
        _program("twisted", twist=SampledFill(fills)),
        width=4 * fills,
        costly=fills > 4,
    )
    for fills in (1, 4, 16)
)
CLAMPED_PERSISTENT = tuple(
    Method(
        f"clamped-persistent-{fills}",
        _program("twisted", twist=PersistentFill(fills)),
        width=4 * fills,
        costly=True,
    )
    for fills in (16, 32)
)
SURPRISE = Method(
    "surprise-exhaustive",
    _program("twisted", twist="exhaustive", surprise=True),
    width=250,
    costly=True,
)
REWEIGHTED = Method(
    "reweighted-16",
    _program("twisted", twist=PersistentFill(16), proposal="reweighted", kappa=KAPPA),
    width=16,
    costly=True,
)
TEMPERING = Method("tempering", _program("tempering"), width=8)

LOCKSTEP, PATH, RATES = (
    Method(name, _program("corrector", form=name)) for name in ("lockstep", "path", "rates")
)

ON_GRID = (BEST_OF_N, IMPORTANCE, BOOTSTRAP, ARGMAX, PERSISTENT_4, PERSISTENT_16)
SHORT = (
    *(BEST_OF_N, BEAM, IMPORTANCE, *SVDD),
    *(ARGMAX, SAMPLE_4, PERSISTENT_4, PERSISTENT_16, *MAX_AND_SUM, TEMPERING),
    *(REWEIGHTED, CLAMPED_ARGMAX, *CLAMPED_SAMPLE, CLAMPED_PERSISTENT[0], SURPRISE),
)
LONG = (
    *(BEST_OF_N, BEAM, IMPORTANCE, *SVDD, ARGMAX, SAMPLE_1, SAMPLE_4),
    *(PERSISTENT_4, PERSISTENT_16, CLAMPED_ARGMAX, *CLAMPED_PERSISTENT),
)
LONG_BEST = (
    *(BEST_OF_N, IMPORTANCE, *SVDD[:2]),
    *(ARGMAX, PERSISTENT_16, CLAMPED_ARGMAX, *CLAMPED_PERSISTENT),
)
LONG_FEW = (IMPORTANCE, ARGMAX, CLAMPED_PERSISTENT[1])
ON_UNIFORM = (IMPORTANCE, ARGMAX, PERSISTENT_4, REWEIGHTED)
ON_PERTURBED = (IMPORTANCE, ARGMAX, PERSISTENT_4, CLAMPED_SAMPLE[1], SURPRISE)
