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
# # What was written there? A blurred digit, and how sure one may be
#
# A digit was blurred and noise came on top. `digits` is a diffusion prior over digits, written as 16 tokens
# each, and a codec turns tokens into images. With the measurement as a likelihood this is a probabilistic
# program. Anchored posterior sampling (`aps`) finds a good answer quickly, and says nothing of the others; the
# same moves with weights (`aps-smc`) say what else it may have been, pixel by pixel.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # a progress bar we do not need

import arviz as az
import matplotlib.pyplot as plt
import pyro
import torch

import ppl_diffusion as ppd
from ppl_diffusion.imaging import weighted
from ppl_diffusion.imaging.codec_error import MeasuredWithError
from ppl_diffusion.imaging.measurement import measure
from ppl_diffusion.imaging.metrics import psnr
from ppl_diffusion.imaging.operators import make_operator
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.models.image_data import load_images

prior, codec = ppd.models.load("digits"), ppd.models.load_codec("digits-codec")
classifier = ppd.models.load_classifier("digits-classifier")


def show(images, titles, **options):
    options = {"cmap": "gray", "vmin": -1, "vmax": 1, **options}
    _, axes = plt.subplots(1, len(images), figsize=(1.5 * len(images), 1.9), layout="constrained")
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image.squeeze(), **options)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    plt.show()


# %% [markdown]
# ## The question
#
# The operator is drawn once and kept with the data, and so is the level of the noise.

# %%
truth = load_images("digits").test[100]  # (1, 16, 16), pixels from -1 to 1; never seen in training
blur = make_operator("gblur", truth.shape)
seen = measure(blur, truth, sigma=0.5, seed=0)
show([truth, seen.y.reshape(16, 16)], ["truth", "measured"])

# %% [markdown]
# ## The program
#
# No 16 tokens decode to exactly this digit: a codec leaves things out. What it leaves out of held-out digits
# is known, and is a part of the model: without it, blurred details that the codec cannot draw would be held
# against the right answer.

# %%
kernel = OrderedKernel(prior.process, prior.denoiser, length=prior.length, group_size=2)
chain = prior.around(kernel)  # two tokens at a time, in random order
model = MeasuredWithError(seen, ppd.models.load_codec_error("digits-codec"))
likelihood = model.potential(codec)


def program():
    path = pyro.sample("path", chain)
    x = pyro.deterministic("x", chain.x0(path), event_dim=1)
    upper = codec.decode(x)[..., :8, :]
    pyro.deterministic("ink", (upper + 1).mean((-3, -2, -1)))  # in the upper half
    ppd.potentials.factor("y", likelihood, x)


# %% [markdown]
# ## Two answers
#
# The guide steers, and the program decides what is asked: `aps` follows the gradient of the likelihood
# through the codebook and commits what it is sure of; `aps-smc` proposes by the same moves.

# %%
aps = SMC(program, method="aps", guide=likelihood, num_particles=16).run(seed=0)
smc = SMC(program, method="aps-smc", guide=likelihood, num_particles=64, num_runs=4).run(seed=0)
for posterior in (aps, smc):
    print(posterior.exact, "|", posterior.target)
    print(*posterior.warnings, sep="\n")
print("log evidence of the runs:", [round(z, 2) for z in smc.log_evidence.tolist()])

# %% [markdown]
# The optimiser has no evidence, and its 16 answers differ by the luck of the order in which tokens were
# committed. Weighted particles have both, and say when there are too few of them.

# %% [markdown]
# ## Pixel by pixel
#
# Draws of the image: a sequence by its weight, decoded, and the error of the codec given the data on top.


# %%
def draws_of(posterior, num=400, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = posterior.resample(num, generator=generator)["x"]
    return model.sample(codec.decode(tokens), generator=generator).clamp(-1, 1)


answers = {"APS": draws_of(aps), "APS-SMC": draws_of(smc)}
equal = torch.full((400,), 1 / 400)
for name, draws in answers.items():
    low, high = weighted.interval(draws, equal)
    show(
        [truth, draws.mean(0), draws.std(0), low, high, *draws[:3]],
        ["truth", f"{name}: mean", "s.d.", "5 %", "95 %", "draws", "", ""],
    )
    print(
        f"{name:>8}: PSNR of the mean {float(psnr(draws.mean(0), truth)):.1f} dB, 90 % intervals hold "
        f"{weighted.coverage(truth, draws, equal):.0%} of the pixels"
    )

# %% [markdown]
# One digit is one trial, and most pixels are background, so that a share of pixels says little. What the data
# leave open shows better in the tokens: how many different sequences, and which digit does a classifier read?

# %%
for name, posterior in {"APS": aps, "APS-SMC": smc}.items():
    tokens = posterior.resample(400, generator=torch.Generator().manual_seed(2))["x"]
    read = classifier(codec.decode(tokens)).softmax(-1).mean(0)
    likely = read.topk(3)
    shares = ", ".join(
        f"{d}: {p:.2f}" for p, d in zip(*map(torch.Tensor.tolist, likely), strict=True)
    )
    print(f"{name:>8}: {len(tokens.unique(dim=0))} sequences in 400 draws; read as {shares}")

# %% [markdown]
# ## A question about the answer
#
# Weighted draws answer any question, with its uncertainty: how much ink is there in the upper half? ArviZ
# takes it from here.

# %%
data = smc.to_arviz()
print(az.summary(data, var_names=["ink"], kind="stats"))
for name, draws in answers.items():
    ink = (draws[..., :8, :] + 1).mean((-3, -2, -1))
    print(f"{name:>8}: {float(ink.mean()):.3f} ± {float(ink.std()):.3f}")
print(f"   truth: {float((truth[..., :8, :] + 1).mean()):.3f}")
