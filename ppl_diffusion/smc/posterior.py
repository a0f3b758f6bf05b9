"""The result of every particle method: weighted draws, evidence, lineage, cost, and its claim."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppl_diffusion.arrays import json_types
from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.smc.genealogy import genealogy_graph
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.resampling import Stratified

if TYPE_CHECKING:
    import networkx as nx

ARRAYS_FILE = "particles.safetensors"
META_FILE = "particles.json"
_FORMAT = 4
_SITE = "samples."
_OPTIONAL = ("compact_path", "log_mass")
"""Arrays that some results do without."""


class Draws:
    """What weighted particles and draws of Markov chains share: ``R`` runs of ``N`` draws."""

    x0: Tensor
    law: Law
    compact_path: Tensor | None

    @property
    def exact(self) -> bool:
        """Whether the draws are exact for :attr:`law`."""
        return self.law.exact

    @property
    def target(self) -> str:
        """The law in words."""
        return str(self.law)

    @property
    def num_runs(self) -> int:
        """Number ``R`` of independent runs, or of Markov chains."""
        return self.x0.shape[0]

    @property
    def path(self) -> Tensor | None:
        """Whole paths, int64 ``(R, N, *plates, T + 1, L)``, or None if they were not stored."""
        return None if self.compact_path is None else self.compact_path.to(torch.int64)


@dataclass(frozen=True, eq=False)
class ParticlePosterior(Draws):
    """``R`` runs of ``N`` weighted particles; immutable.

    :param x0: clean sequences, int64 ``(R, N, *plates, L)`` (of the first chain site).
    :param log_weights: float64 ``(R, N)``, normalised in each run; all ``-inf`` in a dead run.
    :param log_evidence: float64 ``(R,)``; ``exp`` of it is unbiased for the normalising constant.
        NaN where the method estimates none: such runs count alike; ``-inf`` in a dead run.
    :param log_evidence_steps: running value, float64 ``(R, T)``.
    :param evidence_variance: single-run relative variance of ``exp(log_evidence)``, ``(R,)``;
        NaN where degenerate or unknown.
    :param ancestors: int64 ``(T, R, N)``: ``ancestors[k]`` is the parent, in the population after
        step ``k - 1``, of each particle of step ``k``.
    :param eve: root ancestor of each particle, int64 ``(R, N)``.
    :param ess: effective sample size after each step, before resampling, float64 ``(R, T)``.
    :param resampled: whether the run was resampled after each step, bool ``(R, T)``.
    :param died_at: step at which all weights became zero, int64 ``(R,)``, -1 if never.
    :param log_potential: ``log G`` of each particle, float64 ``(R, N)``.
    :param times: the time grid, float64 ``(T + 1,)``.
    :param samples: values of the program's sites, each ``(R, N, ...)``.
    :param num_evaluations: network rows evaluated.
    :param num_potential_calls: sequences the potential (or the program) was asked about.
    :param law: what the weights are exact for, or aim at.
    :param settings: what was chosen, in JSON types.
    :param seconds: wall time.
    :param log_mass: log of the share of the chain's own law that the particles still stand for,
        before each move, float64 ``(R, T)``; its exponential has expectation one. None if unknown.
    :param num_move_rows: rows of the program evaluated to move latents.
    :param num_move_gradients: how many of these were differentiated.
    :param num_scout_rows: rows of networks and programs that the scout run asked for, of those in
        ``num_evaluations``, ``num_potential_calls`` and ``num_move_rows``.
    :param compact_path: stored paths in a small integer type, or None.
    :param is_program: whether the draws are those of a program (then functions get ``samples``).
    """

    x0: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    log_evidence_steps: Tensor
    evidence_variance: Tensor
    ancestors: Tensor
    eve: Tensor
    ess: Tensor
    resampled: Tensor
    died_at: Tensor
    log_potential: Tensor
    times: Tensor
    samples: Mapping[str, Tensor]
    num_evaluations: int
    num_potential_calls: int
    law: Law
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = math.nan
    compact_path: Tensor | None = None
    is_program: bool = False
    log_mass: Tensor | None = None
    num_move_rows: int = 0
    num_move_gradients: int = 0
    num_scout_rows: int = 0

    def to(self, device: str | torch.device) -> ParticlePosterior:
        """Return the same result with its arrays on a device.

        :param device: the device.
        """
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        samples = {name: value.to(device) for name, value in self.samples.items()}
        return replace(self, samples=samples, **moved)

    @property
    def num_particles(self) -> int:
        """Number ``N`` of particles per run."""
        return self.log_weights.shape[1]

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps."""
        return self.ancestors.shape[0]

    @property
    def alive(self) -> Tensor:
        """Runs with any particle of positive weight, bool ``(R,)``."""
        return self.died_at < 0

    @property
    def weights(self) -> Tensor:
        """Normalised weights, float64 ``(R, N)``; zero in a dead run."""
        return self.log_weights.exp()

    @property
    def pooled_log_evidence(self) -> float:
        """Log of the mean of the runs' evidences, dead runs counting as zero (unbiased).

        NaN where the method estimates none.
        """
        return float(torch.logsumexp(self.log_evidence, 0)) - math.log(self.num_runs)

    @property
    def pooled_log_weights(self) -> Tensor:
        """Log-weights over all runs, each run weighted by its evidence, ``(R, N)``; sums to one.

        Runs of a method that estimates no evidence count alike.

        :raises ParticleCollapse: if no run is alive.
        """
        self._require_alive()
        log_w = self.log_weights + self.log_evidence.nan_to_num(0.0, -math.inf, -math.inf)[:, None]
        return log_w - torch.logsumexp(log_w.flatten(), 0)

    def expectation(self, fn: Callable[[Any], Tensor]) -> Tensor:
        """Return the self-normalised weighted mean of a function, one value per run.

        :param fn: of ``x0 (R, N, *plates, L)`` for a bare chain, of the dict of site values (each
            ``(R, N, ...)``) for a program; returns ``(R, N, ...)``.
        :returns: float64 ``(R, ...)``; NaN in a dead run, which knows nothing.
        :raises ParticleCollapse: if no run is alive.
        :raises ValueError: if the function does not return one value per particle.
        """
        self._require_alive()
        values = torch.as_tensor(fn(dict(self.samples) if self.is_program else self.x0))
        if values.shape[:2] != self.log_weights.shape:
            raise ValueError(
                f"expectation: the function returned shape {tuple(values.shape)}, expected it to "
                f"start with (runs, particles) = {tuple(self.log_weights.shape)}."
            )
        weights = self.weights.reshape(*self.log_weights.shape, *[1] * (values.ndim - 2))
        # A zero weight must silence an infinite or NaN value of a particle that does not exist.
        terms = torch.where(weights > 0, weights * values.to(torch.float64), 0.0)
        mean = terms.sum(1)
        alive = self.alive.reshape(-1, *[1] * (mean.ndim - 1))
        return torch.where(alive, mean, torch.nan)

    def resample(
        self, num: int, *, generator: torch.Generator | None = None, pooled: bool = True
    ) -> dict[str, Tensor]:
        """Draw equally weighted particles (stratified); never one of weight zero.

        :param num: number of draws (of draws per run if not pooled).
        :param pooled: draw from all runs, each in proportion to its evidence; otherwise from each
            run separately, leaving dead runs out.
        :returns: site values ``(num, ...)`` if pooled, else ``(alive runs, num, ...)``, with
            ``"x0"`` and the flat indices ``"index"`` into ``(R * N)`` added; a site of the program
            that bears one of these names keeps it.
        :raises ParticleCollapse: if no run is alive.
        """
        if num < 1:
            raise ValueError(f"resample: num must be >= 1, got {num}.")
        self._require_alive()
        if pooled:
            index = _draw_indices(self.pooled_log_weights.reshape(1, -1), num, generator)[0]
        else:
            rows = torch.nonzero(self.alive)[:, 0]
            within = _draw_indices(self.log_weights[rows], num, generator)
            index = within + rows[:, None] * self.num_particles
        sites = {"x0": self.x0, **self.samples}
        drawn = {name: value.flatten(0, 1)[index] for name, value in sites.items()}
        return {"index": index, **drawn}

    def genealogy(self, run: int = 0) -> nx.DiGraph:
        """Return one run's genealogy (see :func:`ppl_diffusion.smc.genealogy.genealogy_graph`)."""
        if not 0 <= run < self.num_runs:
            raise ValueError(f"genealogy: run must lie in 0..{self.num_runs - 1}, got {run}.")
        return genealogy_graph(self.ancestors[:, run], self.eve[run], self.weights[run])

    def to_arviz(self, **options: Any) -> Any:
        """Return ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x)."""
        # Here, not above: xarray is slow to import, and most runs never leave torch.
        from ppl_diffusion.smc.arviz_data import to_arviz

        return to_arviz(self, **options)

    def save(self, directory: str | Path) -> Path:
        """Write ``particles.safetensors`` and ``particles.json``; loading returns the same bits.

        :param directory: created if needed.
        :returns: the directory.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays, meta = self._split()
        save_file(arrays, directory / ARRAYS_FILE)
        text = json.dumps({"format": _FORMAT, **meta}, indent=1, sort_keys=True)
        (directory / META_FILE).write_text(text + "\n")
        return directory

    def _split(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        arrays = {f"{_SITE}{name}": value for name, value in self.samples.items()}
        meta: dict[str, Any] = {"sites": list(self.samples)}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                arrays[item.name] = value
            elif item.name == "law":
                meta["law"] = self.law.to_json()
            elif item.name not in ("samples", *_OPTIONAL):
                meta[item.name] = json_types(value)
        return {name: value.contiguous().clone() for name, value in arrays.items()}, meta

    @classmethod
    def load(cls, directory: str | Path) -> ParticlePosterior:
        """Read what :meth:`save` wrote.

        :raises FileNotFoundError: if it holds no posterior.
        :raises ValueError: if a file is damaged or of another format.
        """
        arrays, meta = _read(Path(directory))
        sites = {name: arrays.pop(f"{_SITE}{name}") for name in meta.pop("sites")}
        contents: dict[str, Any] = {**arrays, **meta, "samples": sites}
        contents["law"] = _read_law(Path(directory), meta["law"])
        return cls(**contents)

    def _require_alive(self) -> None:
        if not bool(self.alive.any()):
            raise ParticleCollapse(
                "every particle of every run has weight zero (died at steps "
                f"{sorted(set(self.died_at.tolist()))}): the evidence estimate is 0; use more "
                "particles, a better twist, or relax the constraint."
            )

    def __repr__(self) -> str:
        return (
            f"ParticlePosterior({self.num_runs} runs x {self.num_particles} particles, "
            f"{self.num_steps} steps, log_evidence={self.pooled_log_evidence:.3f}, "
            f"exact={self.exact})"
        )


def _draw_indices(log_weights: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``num`` stratified indices per row, then shuffle them."""
    uniforms = torch.rand(len(log_weights), num, dtype=torch.float64, generator=generator)
    index = Stratified().draw(uniforms, log_weights)
    order = torch.rand(index.shape, generator=generator).argsort(-1)
    return index.gather(-1, order)


def _read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the checked contents of both files."""
    for name in (ARRAYS_FILE, META_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds no particle posterior: {name} is missing; "
                "give a folder that ParticlePosterior.save or a design run wrote."
            )
    try:
        meta = json.loads((directory / META_FILE).read_text())
        with safe_open(directory / ARRAYS_FILE, framework="pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise _damaged(directory, str(error)) from error
    if not isinstance(meta, dict):
        raise _damaged(directory, f"{META_FILE} holds no JSON object")
    if meta.pop("format", None) != _FORMAT:
        raise ValueError(f"{directory} was written in another format; this one is {_FORMAT}.")
    _check_names(directory, arrays, meta)
    return arrays, meta


def _check_names(directory: Path, arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    names = {item.name: str(item.type).startswith("Tensor") for item in fields(ParticlePosterior)}
    numbers = {name for name, is_array in names.items() if not is_array} - {"samples"}
    _compare(directory, META_FILE, set(meta), numbers | {"sites"})
    if not isinstance(meta["sites"], list):
        raise _damaged(directory, f"'sites' in {META_FILE} is no list")
    kept = {name for name, is_array in names.items() if is_array and name not in _OPTIONAL}
    sites = {f"{_SITE}{name}" for name in meta["sites"]}
    _compare(directory, ARRAYS_FILE, set(arrays) - set(_OPTIONAL), kept | sites)


def _read_law(directory: Path, data: Any) -> Law:
    try:
        return Law.from_json(data)
    except (TypeError, ValueError, KeyError) as error:
        raise _damaged(directory, f"'law' in {META_FILE} is no law ({error})") from error


def _compare(directory: Path, file: str, found: set[str], expected: set[str]) -> None:
    for what, names in (("lacks", expected - found), ("has unknown", found - expected)):
        if names:
            raise _damaged(directory, f"{file} {what} {', '.join(map(repr, sorted(names)))}")


def _damaged(directory: Path, reason: str) -> ValueError:
    return ValueError(
        f"{directory} holds a damaged particle posterior: {reason.rstrip('.')}; write it again "
        "with ParticlePosterior.save or a design run."
    )
