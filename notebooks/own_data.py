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
# # Which hairpin holds best?
#
# A library of 600 short RNA hairpins has been synthesised: stems of three to five base pairs, loops of three to six
# bases. The next ones should hold together better, but look like these: whoever made them knew things about
# making them that nobody wrote down. And they should be short, for every base is paid for.
#
# *Which hairpins of this kind have strong stems, how long are they, and how far is the answer to be trusted?* There is no
# prior for this, and no oracle. There are sequences, and a function that counts hydrogen bonds.

# %%
import json
import random
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar we do not need

import matplotlib.pyplot as plt
import torch

import ppl_diffusion as ppd

draw = random.Random(0)
BONDS = {"GC": 3, "CG": 3, "AU": 2, "UA": 2, "GU": 1, "UG": 1}


def hairpin():
    left = "".join(draw.choices("ACGU", (1, 2, 2, 1), k=draw.randint(3, 5)))
    loop = "".join(draw.choices("ACGU", (4, 1, 1, 2), k=draw.randint(3, 6)))
    right = left[::-1].translate(str.maketrans("ACGU", "UGCA"))
    return left + loop + right


library = [hairpin() for _ in range(600)]
library[:5]

# %% [markdown]
# ## A prior of several lengths
#
# One call reads, splits, trains, and writes a card; from a file it is `ppl-diffusion train library.fasta --alphabet rna`.
# Lengths are a part of the law: a chain draws the length first, so that short and long sequences can be compared.
# The network is tiny here so that this takes seconds.

# %%
folder = Path(tempfile.mkdtemp()) / "prior"
prior = ppd.models.train(library, alphabet="rna", steps=300, dim=32, depth=1, seed=0, out=folder)
prior

# %% [markdown]
# The card says what the prior is worth on sequences that it has not seen, beside Markov chains that count short pieces. In
# a hairpin the last base depends on the first, which no count of neighbours knows.

# %%
metrics = json.loads((folder / "card.json").read_text())["metrics"]
best = metrics["markov"][metrics["best_order"]]
print(f"prior:             at most {metrics['bound']:.1f} bits per sequence")
print(f"best Markov chain: {best:.1f} bits")
print(f"gain:              {metrics['gain']:.1f} ± {metrics['gain_error']:.1f} bits")

# %% [markdown]
# ## A reward
#
# A reward is a function of a list of texts. This one counts the hydrogen bonds of a stem that is closed from both ends
# inward. In the target it is divided by a temperature: a bond more is worth 1/2 nat here, so that
# a GC pair in place of an AU pair makes a sequence $e^{1/2}$ times as likely as under the prior.


# %%
def pairs_of(sequence):
    pairs = []
    for left, right in zip(sequence, reversed(sequence[(len(sequence) + 1) // 2 :]), strict=False):
        if left + right not in BONDS:
            break
        pairs.append(left + right)
    return pairs


def bonds(sequences):
    return [sum(BONDS[pair] for pair in pairs_of(sequence)) for sequence in sequences]


def loop(sequences):  # a judge: no part of the target, it only looks at what comes out
    return [len(sequence) - 2 * len(pairs_of(sequence)) for sequence in sequences]


asked = {"particles": 64, "runs": 4, "seed": 0}
found = ppd.design(
    prior, rewards={"python": bonds, "temperature": 2.0}, judges=loop, forbid=["GGGG"], **asked
)
print(found.summary["target"])

# %% [markdown]
# ## The designs
#
# Weight is the share of the posterior that a sequence stands for: not how good it is, but how much there is of it. The bound
# says how natural the prior finds it.

# %%
for k in range(6):
    row = {name: round(float(values[k]), 2) for name, values in found.columns.items()}
    print(
        f"{found.sequences[k]:<16}  weight {found.designs.weight[k]:.3f}  bonds {row['bonds']:4.0f}  "
        f"loop {row['loop']:2.0f}  log p >= {row['log_prob_bound']:.1f}"
    )

# %% [markdown]
# ## Lengths, before and after
#
# Nobody asked for a length. Longer stems have more bonds, and the prior knows which lengths there are: the posterior weighs
# one against the other. Had a length been fixed beforehand, this could not have been seen.

# %%
weight = found.designs.weight
torch.manual_seed(0)
drawn = prior.decode(prior.chain(num_steps=4).sample((500,))[:, -1])
before, after = (torch.tensor([len(s) for s in texts]) for texts in (drawn, found.sequences))
panels = {
    "length": (before, after, torch.arange(8.5, 17.5).tolist()),
    "hydrogen bonds": (torch.tensor(bonds(drawn)), found.columns["bonds"], 15),
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for ax, (label, (old, new, bins)) in zip(axes, panels.items(), strict=True):
    ax.hist(old.numpy(), bins=bins, density=True, alpha=0.5, label="prior")
    ax.hist(
        new.numpy(), weights=weight.numpy(), bins=bins, density=True, alpha=0.5, label="posterior"
    )
    ax.set(xlabel=label)
    ax.legend()
plt.show()
print(
    f"mean length {before.double().mean():.1f} before, {float(weight @ after.double()):.1f} after"
)

# %% [markdown]
# Short ones are a question of their own: the prior *given* that a sequence has at most twelve bases. Its evidence is the
# logarithm of the mean of $e^{\text{bonds}/2}$ over short sequences of the prior, where the other is that of all (a sequence with GGGG counts as zero). What the
# extra bases are worth is the difference, and the intervals say whether it can be told from nothing.

# %%
short = ppd.design(
    prior,
    rewards={"python": bonds, "temperature": 2.0},
    judges=loop,
    forbid=["GGGG"],
    lengths=(9, 12),
    **asked,
)
print(short.sequences[:3])
for name, result in {"any length": found, "at most 12": short}.items():
    print(f"{name}: log evidence {result.posterior.evidence}")

# %% [markdown]
# ## How far to trust it
#
# Three questions, three places to look.
#
# - *Were there enough particles?* Warnings hold the run to stated limits, and four independent runs should agree.
# - *Is the prior right?* The card above, and its samples. What is exact is exact for this network and this grid of steps,
#   and not for hairpins.
# - *Was the reward fooled?* The judge. More bonds by longer stems should not have eaten the loop: a hairpin with
#   fewer than three bases there cannot fold, and the reward did not know that.

# %%
print(*found.summary["warnings"], sep="\n")
print("log evidence, run by run:", [round(z, 2) for z in found.summary["log_evidence"]])
loops = found.columns["loop"]
tight = float(weight[loops < 3].sum())
told = found.summary["comparison"]["loop"]
print(f"unpaired bases: {sum(loop(library)) / len(library):.1f} in the library,", end=" ")
print(f"{told['prior_mean']:.1f} in prior samples, {told['designs_mean']:.1f} in designs")
print(f"share of the posterior with a loop of fewer than three bases: {tight:.2f}")

# %% [markdown]
# Samples of this prior leave more unpaired than the library does: a network that was trained for seconds knows the pairs in
# part only, and the reward had to find what the prior should have known. For a real question train for minutes; once a
# network knows ties, smaller steps keep more of them (`steps=16` reveals a base at a time).
#
# What the judge finds becomes a part of the question, here as a second reward that costs nothing from three to eight bases:

# %%
rewards = [
    {"python": bonds, "temperature": 2.0},
    {"python": loop, "between": (3, 8), "sd": 0.5},
]
better = ppd.design(prior, rewards=rewards, forbid=["GGGG"], **asked)
print(better.sequences[:5])
print(f"tight loops: {float(better.designs.weight[better.columns['loop'] < 3].sum()):.2f}")
