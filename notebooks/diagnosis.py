# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A bad run, seen and mended
#
# Sequential Monte Carlo always returns *something*: weighted sequences, an evidence, smooth posterior
# means. This notebook makes a run that is badly wrong, shows how every verdict and every plot says so,
# and mends it one cause at a time. The prior is a toy (a Markov chain over six positions of four
# letters), so that everything runs in seconds; the signs are the same on a large one.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar we do not need

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ppl_diffusion as ppd
from ppl_diffusion.testing import toy_markov_chain

LENGTH = 6
chain = toy_markov_chain(vocab_size=4, length=LENGTH, num_steps=LENGTH, seed=1)
table = 0.4 * torch.randn(LENGTH, 4, generator=torch.Generator().manual_seed(3))


def strength(x):
    return 2 + table[torch.arange(LENGTH), x].sum(-1)


def assay(y=None):
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.5))
    x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
    with pyro.plate("replicate", 12):
        pyro.sample("y", dist.Normal(gain * strength(x), 0.1), obs=y)


torch.manual_seed(5)
readings = 3.4 + 0.1 * torch.randn(12)

# %% [markdown]
# ## The bad run
#
# Three choices that look harmless: few particles, latents that are drawn once and never move
# (`moves=None`), and a look-ahead that believes its single guess (`"argmax"`).

# %%
bad = ppd.inference.SMC(
    assay, num_particles=48, num_runs=4, resampler="multinomial", twist="argmax", moves=None
).run(readings, seed=0)
print("posterior mean of the gain, run by run:", bad.expectation(lambda s: s["gain"]).tolist())

# %% [markdown]
# The means alone look like answers. The verdicts do not: each says what is wrong, where, by which limit,
# and what to do.

# %%
for verdict in bad.warnings:
    print("-", verdict)

# %%
ppd.diagnostics.summary_table(bad)

# %% [markdown]
# ## The same, in pictures
#
# - **Effective sample size** drops to a handful where the guess meets the data.
# - **Evidence** differs from run to run by more than any error bar would allow.
# - **Weights** pile up on a few particles.
# - **Token entropy** collapses early: positions are decided before anything is known about them.


# %%
def four_plots(posterior):
    _, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    ppd.diagnostics.plot_ess(posterior, ax=axes[0, 0])
    ppd.diagnostics.plot_evidence(posterior, ax=axes[0, 1])
    ppd.diagnostics.plot_weights(posterior, ax=axes[1, 0])
    ppd.diagnostics.plot_token_entropy(posterior, ax=axes[1, 1])
    plt.show()


four_plots(bad)

# %% [markdown]
# The family trees show why: at the end all particles descend from one or two of the first, and since a
# gain is inherited, there are as few gains.

# %%
ppd.diagnostics.plot_ancestry(bad)
plt.show()
print("distinct gains per run:", [len(run.unique()) for run in bad.samples["gain"]])

# %% [markdown]
# ## Mended, one cause at a time
#
# The default look-ahead averages over several completions and has a floor, so that no sequence is lost
# because of one wrong guess. The default `moves` renew the gain of every particle inside the run, by
# Markov moves that keep the target. And more particles.

# %%
runs = {
    "as it was": bad,
    "+ default look-ahead": ppd.inference.SMC(assay, num_particles=48, moves=None, num_runs=4).run(
        readings, seed=0
    ),
    "+ moves": ppd.inference.SMC(assay, num_particles=48, num_runs=4).run(readings, seed=0),
    "+ particles": ppd.inference.SMC(assay, num_particles=384, num_runs=4).run(readings, seed=0),
}
for name, posterior in runs.items():
    spread = float(posterior.log_evidence.std())
    gains = min(len(run.unique()) for run in posterior.samples["gain"])
    print(
        f"{name:>21}: log evidence {posterior.pooled_log_evidence:7.1f}, runs {spread:5.2f} nats "
        f"apart, at least {gains:3d} gains a run, {len(posterior.warnings)} verdicts"
    )

# %% [markdown]
# All four lines aim at one law, so their evidences may be compared; `compare` does it, and says which of
# them not to believe.

# %%
contenders = [ppd.diagnostics.Contender(name, result) for name, result in runs.items()]
comparison = ppd.diagnostics.compare(contenders)
for note in comparison.notes:
    print("-", note)
ppd.diagnostics.plot_comparison(comparison)
plt.show()

# %%
good = runs["+ particles"]
for verdict in good.warnings:
    print("-", verdict)
four_plots(good)

# %% [markdown]
# ## A second opinion
#
# Agreement of runs is necessary, agreement of *methods* is better: plain importance sampling, which
# looks ahead at nothing and resamples nothing, is hopeless on a long chain and a good referee on a short
# one.

# %%
referee = ppd.inference.SMC(
    assay, method="importance-sampling", num_particles=4000, num_runs=4
).run(readings, seed=1)
for name, posterior in (("bad", bad), ("mended", good), ("referee", referee)):
    gain = float(posterior.expectation(lambda s: s["gain"]).mean())
    print(f"{name:>8}: log evidence {posterior.pooled_log_evidence:6.2f}, gain {gain:.3f}")
