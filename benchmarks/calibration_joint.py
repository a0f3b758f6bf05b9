"""Simulation-based calibration of tokens and parameters in one MCMC (Talts et al. 2018), compiled.

Truth is drawn from a program, data from the truth, and the truth is ranked among draws given these
data. The truth is a draw of the posterior, too: at a random place of a stretch of the Markov chain,
sweeps after it and reversed sweeps before it, its rank is uniform however slowly the chain mixes
(Gandy and Scott 2020, arXiv:2001.06465). All replicates are one compiled program, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from jax import lax
from matplotlib.figure import Figure
from numpyro.handlers import seed, trace
from numpyro.infer import NUTS
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, Gibbs
from rich.console import Console
from scipy.stats import binom, chisquare, kstest

import ppl_diffusion.numpyro as ppn
from benchmarks._report import JsonFile, Quick, Row, console, in_a_folder, table, verdict, write
from ppl_diffusion.testing import toy_chain

CHAIN = ppn.from_torch(toy_chain(vocab_size=3, length=3, num_steps=3, seed=2))
DRAWS, THIN, PARTICLES = 9, 4, 4
LEVEL = 4.0
"""A right sampler fails beyond this once in 10,000 p-values."""

Array = Any
FIXED: dict[str, Any] = {
    "step_size": 0.4,
    "adapt_step_size": False,
    "adapt_mass_matrix": False,
    "max_tree_depth": 3,
}


def zeros(x: Array) -> Array:
    """Return how many tokens are 0."""
    return (x == 0).sum(-1)


def assay(y: Array | None = None, spread: Array = 1.0, stale: Array = False) -> None:
    """Tokens, seen through an instrument of unknown gain and noise.

    :param spread: what the noise is multiplied by: another number than 1 is another program.
    :param stale: is for the sweeps, see :class:`Sweeps`.
    """
    gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.5))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    x = numpyro.deterministic("x", CHAIN.x0(numpyro.sample("path", CHAIN)))
    with numpyro.plate("replicate", 3):
        numpyro.sample("y", dist.Normal(gain * (1 + zeros(x)), spread * noise), obs=y)


class Sweeps(ppn.ParticleGibbs):
    """Sweeps that move the sequences as if the gain were 1 where they are told to be stale."""

    def sample(self, state: Any, model_args: Any, model_kwargs: Any) -> Any:
        """Make the sweeps of one step."""
        held = model_kwargs[GIBBS_SITES_KWARG]
        seen = {**held, "gain": jnp.where(model_args[2], 1.0, held["gain"])}
        return super().sample(state, model_args, {**model_kwargs, GIBBS_SITES_KWARG: seen})


SAMPLERS = {
    "as it is": (1.0, False),
    "noise times 1.5": (1.5, False),
    "sweeps at gain 1": (1.0, True),
}
"""The sampler and its broken twins: ``spread`` and ``stale`` of :func:`assay`."""

STATISTICS: dict[str, Callable[[Mapping[str, Array]], Array]] = {
    "gain": lambda s: s["gain"],
    "noise": lambda s: s["noise"],
    "zeros": lambda s: zeros(s["x"]),
    "sequence": lambda s: s["x"] @ jnp.array([9, 3, 1]),
    "signal": lambda s: s["gain"] * (1 + zeros(s["x"])),
}


def ranks(sampler: str, num: int, key: Array) -> dict[str, np.ndarray]:
    """Return ranks of the truth among ``DRAWS`` draws, 0 to ``DRAWS``, ``(num,)`` by statistic.

    :param sampler: of :data:`SAMPLERS`.
    :param num: replicates.
    """
    found = _replicates(jax.random.split(key, num), *SAMPLERS[sampler])
    return {name: np.asarray(rank) for name, rank in found.items()}


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None))
def _replicates(key: Array, spread: Array, stale: Array) -> dict[str, Array]:
    simulate, place, ties, *runs = jax.random.split(key, 5)
    sites = trace(seed(assay, simulate)).get_trace()
    truth = {name: sites[name]["value"] for name in ("gain", "noise", "path", "x")}
    given = (sites["y"]["value"], spread, stale)
    after, before = (
        _drawn(truth, given, run, backwards=backwards)
        for run, backwards in zip(runs, (False, True), strict=True)
    )
    # So many draws come before the truth, and the others after it: those that are near it count.
    place, near = jax.random.randint(place, (), 0, DRAWS + 1), jnp.arange(DRAWS)
    used = jnp.concatenate([near < DRAWS - place, near < place])
    draws = jax.tree.map(lambda *parts: jnp.concatenate(parts), after, before)
    u = jax.random.uniform(ties)
    return {
        name: _rank(jax.vmap(statistic)(draws), statistic(truth), used, u)
        for name, statistic in STATISTICS.items()
    }


def _drawn(
    truth: Mapping[str, Array], given: tuple[Array, ...], key: Array, *, backwards: bool
) -> dict[str, Array]:
    """Return ``DRAWS`` draws of a chain that starts at the truth, in either direction of time."""
    model = ppn.constant(assay)
    moves = Sweeps(model, num_particles=PARTICLES)
    blocks: list[Any] = [(moves, ["path"]), (NUTS(model, **FIXED), None)]
    kernel = Gibbs(blocks[::-1] if backwards else blocks)
    start = {name: jnp.log(truth[name]) for name in ("gain", "noise")}
    state = kernel.init(key, 0, {**start, "path": truth["path"]}, given, {})

    def thinned(state: Any, _: None) -> tuple[Any, Any]:
        state, _ = lax.scan(lambda s, _: (kernel.sample(s, given, {}), None), state, None, THIN)
        return state, state.z

    _, z = lax.scan(thinned, state, None, DRAWS)
    return {"gain": jnp.exp(z["gain"]), "noise": jnp.exp(z["noise"]), "x": CHAIN.x0(z["path"])}


def _rank(draws: Array, truth: Array, used: Array, u: Array) -> Array:
    """Return the rank of the truth, its place among equals drawn at random."""
    ties = (used & (draws == truth)).sum()
    return (used & (draws < truth)).sum() + (u * (ties + 1)).astype(int)


def p_values(rank: np.ndarray) -> tuple[float, float]:
    """Return the p-values of Pearson's test, and of Kolmogorov's and Smirnov's, of uniform ranks.

    :param rank: ranks 0 to ``DRAWS``, ``(num,)``.
    """
    counts = np.bincount(rank, minlength=DRAWS + 1)
    spread = (rank + np.random.default_rng(0).random(len(rank))) / (DRAWS + 1)
    return float(chisquare(counts).pvalue), float(kstest(spread, "uniform").pvalue)


def measure(num: int, console: Console, plot: Path | None = None) -> list[Row]:
    """Calibrate the sampler and its broken twins.

    :param num: replicates of each.
    :param plot: file of the rank plot.
    """
    found = {name: ranks(name, num, jax.random.key(1)) for name in SAMPLERS}
    made = table(
        f"{num} replicates, rank of the truth among {DRAWS} draws",
        ["sampler", "statistic", "Pearson", "Kolmogorov-Smirnov", "-log10 of the smaller", "goal"],
    )
    rows = []
    for name, by_statistic in found.items():
        for statistic, rank in by_statistic.items():
            pearson, ks = p_values(rank)
            row = Row(
                "calibration",
                -math.log10(max(min(pearson, ks), 1e-300)),
                "-log10 p",
                num,
                LEVEL if name == "as it is" else None,
                {"sampler": name, "statistic": statistic, "pearson": pearson, "ks": ks},
            )
            made.add_row(
                name, statistic, f"{pearson:.2g}", f"{ks:.2g}", f"{row.value:.1f}", verdict(row)
            )
            rows.append(row)
    console.print(made)
    if plot is not None:
        draw(found, plot)
    return rows


def draw(found: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Draw the counts of ranks, and the band that holds each bar with probability 0.99."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(len(found), len(STATISTICS), sharex=True, squeeze=False)
    for row, (name, by_statistic) in zip(axes, found.items(), strict=True):
        for ax, (statistic, rank) in zip(row, by_statistic.items(), strict=True):
            ax.bar(np.arange(DRAWS + 1), np.bincount(rank, minlength=DRAWS + 1), color="0.6")
            low, high = binom.interval(0.99, len(rank), 1 / (DRAWS + 1))
            ax.axhspan(low, high, color="tab:green", alpha=0.25)
            ax.set(title=f"{statistic}, {name}", yticks=[])
    figure.supxlabel(f"rank of the truth among {DRAWS} draws")
    figure.savefig(path)


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(callback=in_a_folder, help="Write the rank plot to this file.")
    ] = None,
) -> None:
    """Calibrate joint inference of tokens and parameters, and two broken twins of it."""
    write(measure(300 if quick else 2000, console(), plot), json_file)


if __name__ == "__main__":
    typer.run(main)
