"""What ArviZ takes of which result: every function on every kind of result works, or says why not.

``python tests/unit/smc/test_arviz_table.py`` writes the part of ``docs/arviz_table.md`` that
belongs to the installed major; the other part stays.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.inference import SMC, ParticleGibbs
from ppl_diffusion.smc import Draws, FeynmanKac, arviz_layout, run_smc
from ppl_diffusion.testing import toy_chain, toy_potential

matplotlib.use("Agg")
az = arviz_layout.import_arviz()
MAJOR = int(az.__version__.split(".")[0])
PAGE = Path(__file__).parents[3] / "docs" / "arviz_table.md"
CHAIN = toy_chain(num_steps=3)
DATA = torch.tensor([1.0, 2.0, 1.5])


def assay(y):
    """Data in a plate."""
    x = pyro.deterministic("x", CHAIN.x0(pyro.sample("path", CHAIN)), event_dim=1)
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.3))
    shift = pyro.sample("shift", dist.Normal(0.0, 0.3))
    with pyro.plate("replicate", 3):
        pyro.sample("y", dist.Normal(gain * x.sum(-1).float() + shift, 1.0), obs=y)


def wish():
    """Factors alone."""
    x = pyro.deterministic("x", CHAIN.x0(pyro.sample("path", CHAIN)), event_dim=1)
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.3))
    shift = pyro.sample("shift", dist.Normal(0.0, 0.3))
    pyro.factor("goal", 0.5 * gain * x.sum(-1).float() + shift)


def smc(model, *args, method="smc", **options):
    return SMC(model, method=method, num_particles=24, num_runs=2, **options).run(*args, seed=0)


def gibbs():
    options = {"num_particles": 4, "num_runs": 2, "num_samples": 24, "num_warmup": 4}
    return ParticleGibbs(assay, nuts={"max_tree_depth": 3}, **options).run(DATA, seed=0)


def read_back():
    with TemporaryDirectory() as folder:
        return Draws.load(smc(assay, DATA, twist=None).save(folder))


RESULTS: dict[str, Callable] = {
    "SMC": lambda: smc(assay, DATA, twist=None),
    "tempering": lambda: smc(assay, DATA, method="tempering", powers=[0.0, 0.4, 1.0]),
    "Gibbs": gibbs,
    "program of factors": lambda: smc(wish, twist=None),
    "bare chain": lambda: run_smc(FeynmanKac(CHAIN, toy_potential()), 24, 2),
    "read from a file": read_back,
}


@dataclass(frozen=True)
class Row:
    """A function of ArviZ, and the options of ``to_arviz`` that it needs."""

    call: Callable
    needs: tuple[str, ...] = ()


def to_file(data):
    with TemporaryDirectory() as folder:
        data.to_netcdf(f"{folder}/data.nc")
        az.from_netcdf(f"{folder}/data.nc").close()


LIK, PPC, PRIOR = ("log_likelihood",), ("posterior_predictive",), ("prior",)
SHARED = {
    "summary": Row(az.summary),
    "rhat": Row(az.rhat),
    "ess": Row(az.ess),
    "mcse": Row(az.mcse),
    "hdi": Row(az.hdi),
    "extract": Row(az.extract),
    "to_netcdf, from_netcdf": Row(to_file),
    "loo": Row(az.loo, LIK),
    "compare": Row(lambda data: az.compare({"a": data, "b": data}), LIK),
    "plot_khat": Row(lambda data: az.plot_khat(az.loo(data, pointwise=True)), LIK),
    "plot_forest": Row(az.plot_forest),
    "plot_trace": Row(az.plot_trace),
    "plot_autocorr": Row(az.plot_autocorr),
    "plot_rank": Row(az.plot_rank),
    "plot_pair": Row(az.plot_pair),
}


def functions():
    """Return the functions of the installed major."""
    if MAJOR >= 1:
        return SHARED | {
            "psense_summary": Row(az.psense_summary, LIK),
            "plot_dist": Row(az.plot_dist),
            "plot_ppc_dist": Row(lambda data: az.plot_ppc_dist(data, num_samples=5), PPC),
            "plot_loo_pit": Row(az.plot_loo_pit, LIK + PPC),
            "plot_prior_posterior": Row(az.plot_prior_posterior, PRIOR),
        }
    return SHARED | {
        "to_dataframe": Row(lambda data: data.to_dataframe()),
        "waic": Row(az.waic, LIK),
        "plot_posterior": Row(az.plot_posterior),
        "plot_density": Row(az.plot_density),
        "plot_ppc": Row(lambda data: az.plot_ppc(data, num_pp_samples=5), PPC),
        "plot_bpv": Row(az.plot_bpv, PPC),
        "plot_dist_comparison": Row(az.plot_dist_comparison, PRIOR),
    }


OWN_REASONS = {
    ("plot_pair", "bare chain"): "plot_pair: a bare chain has one number, its log_potential.",
}
"""What a function cannot do with a result that holds all there is."""


@cache
def result(kind):
    return RESULTS[kind]()


@cache
def data_of(kind, needs):
    """Return ArviZ data, or why there are none."""
    options = {"log_likelihood": True, "posterior_predictive": True, "prior": 10}
    try:
        return result(kind).to_arviz(**{name: options[name] for name in needs}), None
    except ValueError as error:
        return None, str(error)


@cache
def refusal(function, kind):
    """Return why a function does not take a result, None if it does."""
    import matplotlib.pyplot as plt

    row = functions()[function]
    data, why = data_of(kind, row.needs)
    if data is None:
        return why
    with warnings.catch_warnings():
        # of few draws, of small samples, and of what ArviZ calls in libraries newer than it
        warnings.simplefilter("ignore")
        try:
            row.call(data)
        except ValueError:
            if (function, kind) not in OWN_REASONS:
                raise
            return OWN_REASONS[function, kind]
        finally:
            plt.close("all")
    return None


MISSING = {
    "bare chain": "this is the result of a bare chain",
    "program of factors": "the program observes nothing",
    "read from a file": "files do not keep it; say which it was: posterior = ppd.inference.attach",
}


@pytest.mark.parametrize("kind", RESULTS)
def test_every_function_works_or_says_why(kind):
    for function, row in functions().items():
        why = refusal(function, kind)
        if why is None or (function, kind) in OWN_REASONS:
            continue
        assert row.needs, f"{function}: {why}"
        assert MISSING[kind] in why


def section():
    """Return the table of the installed major, in Markdown."""
    lines = [
        f"## ArviZ {MAJOR}.x",
        "",
        "| function | " + " | ".join(RESULTS) + " |",
        "| --- |" + " --- |" * len(RESULTS),
    ]
    reasons: dict[str, int] = {}
    for function, row in functions().items():
        cells = []
        for kind in RESULTS:
            why = refusal(function, kind)
            if why is not None:
                why = why.replace(f"to_arviz({row.needs[0]}=...): " if row.needs else "", "")
            number = None if why is None else reasons.setdefault(why, len(reasons) + 1)
            cells.append("works" if number is None else f"no ({number})")
        asked = f" (`to_arviz({', '.join(f'{name}=' for name in row.needs)})`)" if row.needs else ""
        lines.append(f"| `{function}`{asked} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {why}" for why, number in reasons.items())]
    return "\n".join(lines) + "\n"


def test_the_page_says_what_is_so():
    assert section() in PAGE.read_text()


if __name__ == "__main__":
    top, *parts = PAGE.read_text().split("\n## ")
    kept = {part[:7]: "## " + part.rstrip() + "\n" for part in parts}
    mine = section()
    kept[mine[3:10]] = mine
    PAGE.write_text("\n".join([top.rstrip() + "\n", *(kept[name] for name in sorted(kept))]))
