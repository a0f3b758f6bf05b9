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
# # Gaps in three promoters
#
# Three yeast promoters were sequenced badly: a stretch of 20, 30 and 40 bases in the middle could not be
# read. What they express was measured in triplicate, on an instrument whose gain and noise nobody knows,
# beside six readings of a reference of known strength. *How strong are the promoters, how good is the
# instrument, and what do the readings say about the gaps?*
#
# Tokens and parameters are inferred together, in NumPyro: conditional SMC moves the sequences given the
# instrument, and NUTS moves the instrument given the sequences. The last section shows what two simpler
# ways make of the same data.

# %%
import warnings

warnings.filterwarnings("ignore", message="\nArviZ is undergoing a major refactor")
warnings.filterwarnings("ignore", message="Some donated buffers were not usable")

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import condition
from numpyro.infer import MCMC, NUTS
from numpyro.infer.gibbs import Gibbs

import ppl_diffusion as ppd
import ppl_diffusion.numpyro as ppn

prior = ppd.models.load("yeast-promoter")
oracle = ppd.models.load_oracle("yeast-oracle-design")

# %% [markdown]
# ## What a promoter is worth
#
# Of the shipped oracle we take the member that is linear in words of six bases, and write it in JAX: the
# strength is a sum of what the words are worth.

# %%
LENGTH, WORD = prior.length, oracle.linear.k
worth, constant = jnp.asarray(oracle.linear.weight.numpy()), float(oracle.linear.bias)


def strength(x):
    """Return the strength of sequences ``(..., 80)``."""
    ends = [LENGTH - WORD + 1 + i for i in range(WORD)]
    words = sum(4 ** (WORD - 1 - i) * x[..., i:end] for i, end in enumerate(ends))
    return oracle.config.centre + oracle.config.scale * (constant + worth[words].sum(-1))


# %% [markdown]
# ## Three promoters and their data
#
# The truth is three draws of the prior, a weak, a middling and a strong one.

# %%
wide = ppn.from_torch(prior.chain(num_steps=8))
draws = wide.x0(wide.sample(jax.random.key(0), (24,)))
truth = draws[jnp.argsort(strength(draws))[jnp.array([3, 12, 20])]]
GAIN, NOISE, REFERENCE = 1.2, 0.4, float(strength(draws).mean())

noise = NOISE * jax.random.normal(jax.random.key(1), (15,))
reference = GAIN * REFERENCE + noise[:6]
readings = GAIN * strength(truth) + noise[6:].reshape(3, 3)  # replicates by promoters

starts, gaps = 20, jnp.array([20, 30, 40])[:, None]
hidden = (jnp.arange(LENGTH) >= starts) & (jnp.arange(LENGTH) < starts + gaps)
for sequence, gap in zip(truth.tolist(), hidden.tolist(), strict=True):
    bases = (prior.vocabulary[base] for base in sequence)
    print("".join("." if out else base for base, out in zip(bases, gap, strict=True)))

# %% [markdown]
# ## The program
#
# What was read is the *prompt* of the chain: those bases are there from the start, and the network fills
# the gaps around them. The prompt differs by promoter, and the plate with it. Four steps are few: ten bases
# of the longest gap are filled at a time. That chain *is* the prior here, and the inference is exact for it.

# %%
kernel = ppn.from_torch(prior.chain(num_steps=4)).kernel
chain = ppn.ReverseChain(kernel, LENGTH, jnp.where(hidden, -1, truth))


def assays(reference, readings):
    gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.3))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("reference_replicate", 6):
        numpyro.sample("reference", dist.Normal(gain * REFERENCE, noise), obs=reference)
    with numpyro.plate("promoter", 3, dim=-1):
        x = numpyro.deterministic("x", chain.x0(numpyro.sample("path", chain)))
        signal = numpyro.deterministic("strength", strength(x))
        with numpyro.plate("replicate", 3, dim=-2):
            numpyro.sample("readings", dist.Normal(gain * signal, noise), obs=readings)


# %% [markdown]
# ## Joint inference
#
# `constant` leaves the density of the paths out of NUTS's gradients, where it is a constant. Given gain and
# noise the promoters are independent, which the sweep finds out by itself: each of them has a small
# population of its own. Two chains run side by side (`chain_method=jax.vmap`).

# %%
model = ppn.constant(assays)
sweeps = ppn.ParticleGibbs(model, num_particles=4)
mcmc = MCMC(
    Gibbs([(sweeps, ["path"]), (NUTS(model), None)]),
    num_warmup=60,
    num_samples=200,
    num_chains=2,
    chain_method=jax.vmap,
    progress_bar=False,
)
watched = {"block_states.0.moved": "moved", "block_states.1.diverging": "diverging"}
mcmc.run(jax.random.key(2), reference, readings, extra_fields=tuple(watched))

# %% [markdown]
# ArviZ takes the result as that of any other NumPyro kernel. R-hat and effective sample sizes of the
# strengths tell how well the *sequences* mix. `moved` is the share of promoters that a sweep has changed;
# divergences are those of NUTS.

# %%
posterior = az.from_numpyro(mcmc, log_likelihood=False)
posterior.sample_stats = posterior.sample_stats.rename(watched)
print("moved:", float(posterior.sample_stats["moved"].mean()))
print("divergences:", int(posterior.sample_stats["diverging"].sum()))
table = az.summary(posterior, var_names=["gain", "noise", "strength"], kind="all", round_to=3)
table[["mean", "sd", "hdi_3%", "hdi_97%", "ess_bulk", "ess_tail", "r_hat"]]

# %%
print("truth:", GAIN, NOISE, strength(truth))
az.plot_rank(posterior, var_names=["gain", "noise", "strength"], grid=(1, 5), figsize=(16, 3))
plt.show()

# %% [markdown]
# The chains are short, so that the notebook stays quick: read R-hat before the means, and draw more where
# it is above 1.01.
#
# ## What the readings say about the gaps
#
# Beside the posterior, what the prior expects of the same gaps before anything is measured. Readings narrow
# the strengths: a few words of a gap make most of the difference.

# %%
before = chain.x0(chain.sample(jax.random.key(3), (100,)))
after = mcmc.get_samples()["x"]
figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
for i, ax in enumerate(axes):
    for x, label in ((before, "bases that were read"), (after, "and readings")):
        ax.hist(np.asarray(strength(x[:, i])), bins=20, density=True, alpha=0.5, label=label)
    ax.axvline(float(strength(truth[i])), color="black")
    ax.set(xlabel=f"strength of promoter {i}", yticks=[])
axes[0].legend()
plt.show()

# %% [markdown]
# Which base stands where is another question. The truth's probability, averaged over a gap, hardly rises:
# many fillings have the same strength, and three numbers cannot tell them apart. What was read stays.

# %%
for i, gap in enumerate(np.asarray(hidden)):
    shares = [float((x[:, i] == truth[i])[:, gap].mean()) for x in (before, after)]
    print(
        f"promoter {i}: probability of the true base {shares[0]:.2f} before, {shares[1]:.2f} after"
    )
    assert bool((after[:, i] == truth[i])[:, ~gap].all())

# %% [markdown]
# ## Without particle Gibbs
#
# NUTS cannot move tokens, and one may be tempted to hold them at a guess: one filling that the prior finds
# good. The strengths are then those of the guess, without any error, and what it has wrong is put down to
# the instrument: more noise, another gain.

# %%
guess = chain.sample(jax.random.key(4))
held = MCMC(
    NUTS(condition(model, {"path": guess})), num_warmup=200, num_samples=300, progress_bar=False
)
held.run(jax.random.key(5), reference, readings)
print("guessed strengths:", strength(chain.x0(guess)), "and true ones:", strength(truth))
for name, true in (("gain", GAIN), ("noise", NOISE)):
    for how, run in (("at a guess", held), ("jointly", mcmc)):
        low, high = az.hdi(np.asarray(run.get_samples()[name]), hdi_prob=0.94)
        print(f"{name:>5} {how:>10}: {low:.2f} to {high:.2f} (true: {true})")

# %% [markdown]
# The other way is to draw everything from the prior and to weigh it: right in the limit, and hopeless here.
# Of all draws hardly one counts, and the result says so itself.

# %%
weighed = ppn.SMC(assays, num_particles=100, twist=None, ess_threshold=0.0).run(
    jax.random.key(6), reference, readings
)
print(f"effective draws of 100: {float(weighed.ess[0, -1]):.1f}")
for verdict in weighed.warnings:
    print("-", verdict)
