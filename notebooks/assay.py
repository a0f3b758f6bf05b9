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
# # Which promoter was it?
#
# A tube lost its label. All that is known: it held a yeast promoter of 80 bases, without a BsaI site
# (it survived the digest), and the reporter assay read an expression of **13** on a scale from 0 to
# 17. The instrument's gain drifts by about ten per cent from day to day.
#
# *Which promoters are compatible with that, and what was the gain?* This is a question for Bayes'
# rule with two unknowns of very different kinds: a sequence and a number. The prior over sequences is
# a masked diffusion model; everything else is an ordinary Pyro program.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar we do not need

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ppl_diffusion as ppd

prior = ppd.models.load("yeast-promoter")
oracle = ppd.models.load_oracle("yeast-oracle-design")
judge = ppd.models.load_oracle("yeast-oracle-judge")
prior

# %% [markdown]
# ## The model
#
# `prior.chain(...)` is a distribution over whole reverse paths: 21 states of 80 tokens, from all-masked
# to clean. Its `log_prob` is exact. The clean sequence is read off the end of the path, and the rest
# depends on it alone: a hard constraint, a latent gain, an observation.

# %%
chain = prior.chain(num_steps=20)
no_bsai = ppd.potentials.ForbiddenMotif("GGTCTC")


def assay(y=None):
    path = pyro.sample("path", chain)
    x = pyro.deterministic("x", chain.x0(path))
    ppd.potentials.factor("no_bsai", no_bsai, x)
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.1))
    pyro.sample("y", dist.Normal(gain * oracle(x), 0.5), obs=y)


observed = torch.tensor(13.0)
chain

# %% [markdown]
# ## Before the data
#
# What does the prior expect? Draw from it, and ask the oracle. A reading of 13 lies in the upper tail:
# few prior draws come near, so weighting prior draws by the likelihood will be wasteful.

# %%
torch.manual_seed(0)
prior_draws = chain.x0(chain.sample((128,)))
prior_expression = oracle(prior_draws)
print("\n".join(prior.decode(prior_draws[:3])))
print(f"expression under the prior: {prior_expression.mean():.1f} ± {prior_expression.std():.1f}")

# %% [markdown]
# ## Plain importance sampling
#
# Pyro's own `Importance` runs on the program as it stands, because every site has an exact density. It
# is right in the limit, and honest about being far from it: look at the effective sample size.

# %%
importance = pyro.infer.Importance(assay, num_samples=48).run(y=observed)
log_weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights])
weights = torch.softmax(log_weights, 0)
print(f"log evidence {importance.get_log_normalizer():.2f}")
print(f"effective sample size {1 / (weights**2).sum():.1f} of {len(weights)}")

# %% [markdown]
# ## Sequential Monte Carlo on the same program
#
# `SMC` moves all particles down the chain side by side. At each step it completes the unfinished
# sequences, asks the *program* how good the completions are, and resamples where the weights have
# become uneven. The completions (the *twist*) only decide where particles go: what they add at one
# step is taken back at the next (the increments telescope), and at the end the program itself has the
# last word. So every twist has the same target, and a bad one costs variance, not correctness.
#
# That is no licence to be careless. Two twists:
#
# - `"argmax"` fills every masked position with its likeliest base. These promoters are nearly random,
#   so the likeliest base at *every* position is a sequence nobody has seen, and the narrow likelihood
#   takes the oracle's opinion of it seriously.
# - `"defensive"`, the default, averages over it and four random completions that each particle keeps,
#   and mixes in a floor, so that no sequence is lost because of a wrong guess.

# %%
twists = {"argmax": "argmax", "defensive": "defensive"}
results = {
    name: ppd.inference.SMC(assay, num_particles=48, num_runs=4, twist=twist).run(
        y=observed, seed=0
    )
    for name, twist in twists.items()
}
for name, result in results.items():
    runs = ", ".join(f"{z:.1f}" for z in result.log_evidence.tolist())
    print(f"{name:>10}: log evidence {result.pooled_log_evidence:6.1f}  (runs: {runs})")

# %% [markdown]
# Both lines estimate the same number, without bias. An unbiased estimate that is *usually* far too
# low must be far too high once in a long while: that is what a heavy tail looks like from inside, and
# why estimates that disagree by nats should be settled in favour of the higher one, which found mass
# that the lower one missed. Agreement between runs is necessary, not sufficient; agreement between
# *methods* is worth more. So go on with the better guide:

# %%
posterior = results["defensive"]
print(posterior.target)
print(f"exact: {posterior.exact}")

# %% [markdown]
# `exact` is a claim about weights: averages converge to those of the stated target as particles grow.
# It is *not* a claim about nature. The target contains a learned prior, a chain of finitely many steps
# and a learned oracle.

# %%
ppd.diagnostics.summary_table(posterior)

# %% [markdown]
# How to read this:
#
# - **Evidence.** Each run gives an estimate of $p(y)$ whose expectation is right for any number of
#   particles. Its *logarithm* is biased low, so runs are pooled before the logarithm is taken. The
#   spread across runs is the error bar to believe first; the single-run figure, from the family tree,
#   becomes too small, or undefined, once few ancestors are left.
# - **k-hat** is the tail index of the final weights. Below 0.7 their averages are reliable; it says
#   nothing about what was lost at earlier resampling steps.
# - **Root ancestors** are the particles of the first step that have descendants at the end. All
#   descendants of one root share their early reveals. Where few roots are left, agreement between runs,
#   not the number of particles, measures how well the posterior was explored. For the same reason
#   `rhat` and `ess` *across draws of one run* mean nothing.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
ppd.diagnostics.plot_ess(posterior, ax=axes[0])
ppd.diagnostics.plot_evidence(posterior, ax=axes[1])
plt.show()

# %%
ppd.diagnostics.plot_ancestry(posterior)
plt.show()

# %% [markdown]
# ## The answer
#
# Draw equally weighted particles, pooled over runs in proportion to their evidence, and set them
# against the prior. The second panel asks an oracle that was fitted on *other families* of promoters
# and took no part in the design: what it does not confirm was an error of the first oracle that the
# posterior exploited.

# %%
draws = posterior.resample(256, generator=torch.Generator().manual_seed(1))
figure, axes = plt.subplots(1, 2, figsize=(11, 3.5), sharex=True, sharey=True, layout="constrained")
for ax, scale, title in zip(axes, (oracle, judge), ("design oracle", "judge"), strict=True):
    ax.hist(scale(prior_draws).numpy(), bins=20, density=True, alpha=0.5, label="prior")
    ax.hist(scale(draws["x"]).numpy(), bins=20, density=True, alpha=0.5, label="posterior")
    ax.set(xlabel=f"expression, {title}")
    ax.legend()
plt.show()

# %% [markdown]
# The gain is a latent variable like any other. A high reading is explained partly by a strong promoter
# and partly by a gain above one: the two trade off, and the posterior says how much. Gains drawn once,
# at the start, would only be thinned out afterwards; so each particle renews its own inside the run, by
# Markov moves that leave the target as it is (`moves="auto"`, the default). One mean per run shows how
# far the runs agree.

# %%
by_run = posterior.expectation(lambda s: s["gain"])
distinct = [len(run.unique()) for run in posterior.samples["gain"]]
print(f"distinct gains, run by run: {distinct} of {posterior.num_particles}")
print("posterior mean of the gain, run by run:", [round(g, 3) for g in by_run.tolist()])
expression = oracle(draws["x"])
correlation = torch.corrcoef(torch.stack([draws["gain"].flatten().float(), expression]))[0, 1]
print(f"correlation of gain and expression in the posterior: {correlation:.2f}")

# %% [markdown]
# ArviZ takes over from here. Chains are runs, draws are particles; weights have been resampled away
# because ArviZ's plots ignore them.

# %%
data = posterior.to_arviz(vocabulary=prior.vocabulary)
az.plot_density([data], var_names=["gain"])
plt.show()
az.summary(data, var_names=["gain"], kind="stats")

# %% [markdown]
# Finally, the sequences. Weights say how much posterior mass a particle stands for, not how good a
# promoter is; the bound says how natural the prior finds it. It is a lower bound on the
# log-probability, estimated from a few noise levels, and should be read as one.

# %%
few = posterior.resample(5, generator=torch.Generator().manual_seed(2))["x"]
bound = chain.marginal().log_prob_bound(few, num_samples=32)
for text, design, second, nats in zip(
    prior.decode(few), oracle(few), judge(few), bound, strict=True
):
    print(f"{text}  oracle {design:5.1f}  judge {second:5.1f}  log p >= {nats:.0f} nats")
assert all(bool(no_bsai.satisfied(x)) for x in few)
