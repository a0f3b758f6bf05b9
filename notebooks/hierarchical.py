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
# # Two promoters, one instrument
#
# Two promoters were measured in triplicate on one instrument, whose gain and noise nobody knows. Of the
# first promoter half the bases were read by a sequencer; one reading of the second got lost. *What are
# the sequences, the gain and the noise?*
#
# The unknowns are of two kinds, and they are tangled: a high reading means a strong promoter or a high
# gain. The program says so in a dozen lines, and two very different methods answer it. The prior is a toy
# (a Markov chain over six positions of four letters), so that the notebook runs in seconds; with
# `prior.chain(...)` of a shipped model in its place nothing else changes.

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


# %% [markdown]
# ## The program
#
# Gain and noise are shared; each promoter is a chain site of its own. `obs_mask` marks the lost reading,
# which becomes one more unknown.


# %%
def assays(y, seen):
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.3))
    noise = pyro.sample("noise", dist.HalfNormal(0.5))
    for i in range(2):
        path = pyro.sample(f"path_{i}", chain)
        x = pyro.deterministic(f"x_{i}", chain.x0(path), event_dim=1)
        with pyro.plate(f"replicate_{i}", 3):
            pyro.sample(
                f"y_{i}", dist.Normal(gain * strength(x), noise), obs=y[i], obs_mask=seen[i]
            )


torch.manual_seed(4)
truth = chain.x0(chain.sample((2,)))
readings = 1.1 * strength(truth)[:, None] + 0.4 * torch.randn(2, 3)
seen = torch.tensor([[True, True, True], [True, True, False]])
readings

# %% [markdown]
# Half of the first sequence was read. `clamp` conditions the chain on it (`pyro.condition` of `x_0` would
# observe nothing, and is refused):

# %%
read = torch.arange(LENGTH) < LENGTH // 2
program = ppd.handlers.clamp(assays, tokens=truth[0], mask=read, sites=["path_0"])

# %% [markdown]
# ## Sequential Monte Carlo, with latents that move
#
# Particles hold both sequences, the gain and the noise. Gains drawn once from the prior would be thinned
# out until one is left; so each particle renews its own inside the run, by Markov moves that leave the
# target as it is (`moves="auto"`, the default), tuned on a scout run of their own.

# %%
smc = ppd.inference.SMC(program, num_particles=512, num_runs=4).run(readings, seen, seed=0)
print(smc.target)
print("log evidence by run:", [round(z, 1) for z in smc.log_evidence.tolist()])
print("distinct gains by run:", [len(run.unique()) for run in smc.samples["gain"]])
for verdict in smc.warnings:
    print("-", verdict)

# %% [markdown]
# Read the verdicts before the numbers. One about the prior's *mass* says that most sequences of the prior
# have no descendants: as it must be where the data exclude them, and a loss where the look-ahead was
# wrong. Runs that agree, and another method that runs for long enough, tell the two apart.
#
# ## Particle Gibbs
#
# The other way round: a Markov chain that alternates conditional SMC for the sequences with the No-U-Turn
# sampler for gain and noise. No evidence, but draws that improve for as long as one waits. It is far too
# short here, so that the notebook stays quick, and says so.

# %%
gibbs = ppd.inference.ParticleGibbs(
    program, num_particles=12, num_runs=2, num_samples=30, num_warmup=15, nuts={"max_tree_depth": 3}
).run(readings, seen, seed=0)
for verdict in gibbs.warnings:
    print("-", verdict)

# %% [markdown]
# ## Do they agree?
#
# One number per run of each method. The means come out near each other, but not always within the spread
# of the runs, and need not: two short chains that have not mixed may lie close together by chance, so that
# their spread is no error. That is what their verdicts say. Draw more until these are gone, and only then
# read a difference between the methods as an error of one of them.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
questions = {
    "gain": lambda s: s["gain"],
    "noise": lambda s: s["noise"],
    "the lost reading": lambda s: s["y_1"][..., 2],
}
for ax, (name, ask) in zip(axes, questions.items(), strict=True):
    for row, (method, posterior) in enumerate((("SMC", smc), ("Gibbs", gibbs))):
        means = posterior.expectation(ask)
        ax.plot(means, torch.full((len(means),), float(row)), "o", alpha=0.6)
        print(
            f"{name:>17}, {method:>5}: {float(means.mean()):.2f} ± {float(means.std()):.2f} (runs)"
        )
    ax.set(xlabel=name, yticks=[0, 1], yticklabels=["SMC", "Gibbs"], ylim=(-0.6, 1.6))
plt.show()

# %% [markdown]
# ## The answer
#
# Gain and strength trade off against each other: neither is known alone as well as their product is.

# %%
draws = smc.resample(400, generator=torch.Generator().manual_seed(1))
figure, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
ax.plot(draws["gain"], strength(draws["x_1"]), ".", alpha=0.3)
ax.set(xlabel="gain", ylabel="strength of the second promoter")
plt.show()

# %% [markdown]
# Base by base: the posterior probability of the true base, read or not.

# %%
for i in range(2):
    share = (draws[f"x_{i}"] == truth[i]).float().mean(0)
    print(f"promoter {i}:", [round(p, 2) for p in share.tolist()])
assert bool((draws["x_0"][:, read] == truth[0, read]).all())
