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
# # What do names have in common? The latent tells
#
# `latent-names` is a prior over first names that draws two codes beside the letters (LADD). The codes are
# sites of a probabilistic program like any other: here they are read off real names, looked at in ArviZ,
# conditioned on, edited one at a time, and, where they are vectors, given to NUTS.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar we do not need

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import ppl_diffusion as ppd
from ppl_diffusion.kernels import Path

prior = ppd.models.load("latent-names")
LENGTH, BLANK = prior.length, "_"


def encode(names):
    return prior.encode([name.ljust(LENGTH, BLANK) for name in names])


def decode(tokens):
    return [text.rstrip(BLANK) for text in prior.decode(tokens)]


# %% [markdown]
# ## Latents of real names
#
# The encoder says which codes a name has. Names that share a code share something: an ending, a length, a
# sound.

# %%
names = [
    "emma",
    "anna",
    "hannah",
    "liam",
    "noah",
    "jayden",
    "brayden",
    "kayden",
    "isabella",
    "gabriella",
]
codes = prior.encode_latent(encode(names))
for name, pair in zip(names, codes.tolist(), strict=True):
    print(f"{name:>10}  {pair}")

# %% [markdown]
# A code is worth something if it makes the letters predictable before any of them is known. Below, the
# cost of a whole name in one step without the latent, and given it (nats, a mean over the names above).

# %%
none, given = Path.masked(1), Path.sequential(2, 1)
generator = torch.Generator().manual_seed(0)
for label, path in {"without": none, "latent first": given}.items():
    bound = prior.bound(encode(names), path, num_samples=16, generator=generator)
    letters, latent = float(bound.tokens.mean()), float(bound.latent.mean())
    print(
        f"{label:>13}: letters {letters:5.2f}, latent {latent:5.2f}, together {bound.mean:5.2f} nats"
    )

# %% [markdown]
# ## Tokens and latent together, in a program
#
# Two chains, one after the other. The data: the name is short, says a noisy observation of its length.


# %%
def program(length=None):
    chain = prior.latent_chain(2)
    code = pyro.deterministic("code", chain.x0(pyro.sample("latent", chain)), event_dim=1)
    tokens = prior.token_chain(6, latent=code)
    x = pyro.deterministic("x", tokens.x0(pyro.sample("path", tokens)), event_dim=1)
    count = pyro.deterministic("letters", (x != prior.vocabulary.index(BLANK)).sum(-1).double())
    pyro.sample("length", dist.Normal(count, 0.5), obs=length)


posterior = ppd.inference.SMC(program, num_particles=128, num_runs=4).run(torch.tensor(4.0), seed=0)
print("names:", decode(posterior.resample(8, generator=torch.Generator().manual_seed(1))["x"]))
print("log evidence of the runs:", [round(z, 2) for z in posterior.log_evidence.tolist()])

# %% [markdown]
# Weights, evidence and all sites go to ArviZ: the codes of short names are not those of all names.

# %%
data = posterior.to_arviz()
print(az.summary(data, var_names=["letters"], kind="stats"))
used = torch.bincount(
    posterior.resample(2000, generator=torch.Generator().manual_seed(2))["code"][:, 0],
    minlength=128,
)
free = prior.latent_chain(2)
unconditioned = torch.bincount(free.x0(free.sample((2000,)))[:, 0], minlength=128)

_, axis = plt.subplots(figsize=(9, 3), layout="constrained")
axis.bar(range(128), unconditioned / 2000, label="prior", alpha=0.6)
axis.bar(range(128), used / 2000, label="given four letters", alpha=0.6)
axis.set(xlabel="first code", ylabel="share")
axis.legend()
plt.show()

# %% [markdown]
# ## Condition on a latent, edit one slot and keep the other
#
# Take the codes of a real name, hold one slot and let the other follow its law: `clamp` conditions the code
# chain exactly. What is kept is what the held code stands for.

# %%
for held in (0, 1):
    mask = torch.arange(2) == held
    like = ppd.handlers.clamp(program, tokens=codes[5], mask=mask, sites=["latent"])
    some = ppd.inference.SMC(like, num_particles=64).run(seed=3)
    drawn = some.resample(8, generator=torch.Generator().manual_seed(4))["x"]
    print(f"code {held} of {names[5]!r} held:", decode(drawn))
both = prior.token_chain(6, latent=codes[5])
pyro.set_rng_seed(5)
print(f"both codes of {names[5]!r} held:", decode(both.x0(both.sample((8,)))))

# %% [markdown]
# ## Vectors instead of codes: NUTS
#
# `latent-names-co` has two vectors in their place. They have gradients: which latents may have led to a name
# that was seen, if its letters were drawn at once?

# %%
smooth = ppd.models.load("latent-names-co")
seen = smooth.encode("jayden".ljust(LENGTH, BLANK))
way = smooth.latent_chain(1)


def letters_at_once():
    latent = way.latent(pyro.sample("latent", way))
    pyro.deterministic("z", latent, event_dim=2)
    step = smooth.token_chain(1, latent=latent)
    carry = step.start(step.batch_shape)
    pyro.sample("x", step.kernel.step(carry, 0), obs=seen)


pyro.set_rng_seed(0)
mcmc = MCMC(
    NUTS(letters_at_once, max_tree_depth=3), num_samples=60, warmup_steps=40, disable_progbar=True
)
mcmc.run()
latents = mcmc.get_samples()["latent"][:, -1]
print(az.summary(az.from_dict(posterior={"z": latents[None].numpy()}), kind="stats").head(4))

# %% [markdown]
# New names from these latents stay close to the one that was seen; from the prior they do not.

# %%
near = smooth.token_chain(6, latent=latents[::8])
print("near:", decode(near.x0(near.sample())))
far = smooth.chain("seq", latent_steps=4, token_steps=6)
print("prior:", decode(far.x0(far.sample((8,)))))
