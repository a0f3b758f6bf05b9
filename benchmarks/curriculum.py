"""Memory and time of the losses that train a uniform prior over a large vocabulary.

Losses at ``V = 50,257``, each forward and backward through a small head and embedding, against
published forms in float32 written here:

* ``uniform-nelbo``: the published bound on a dense log-softmax and a dense ``Y``, by autograd,
  against :func:`~ppl_diffusion.denoisers.uniform_nelbo.uniform_nelbo_from_hidden`;
* ``curriculum``: the same after soft inputs, the ``k`` largest entries of a Gaussian softmax times
  the embedding, in the efficient form that was published (Duo++), with its approximations, against
  ours, which draws from the law itself;
* ``curriculum over dense``: ours against a Gaussian softmax over the whole vocabulary (Duo).

Ratios are ours over straightforward. Memory is what a step adds to the peak of a fresh process.
Gradients are compared with the straightforward form in float64, on the same latents.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._report import Row, run, table, verdict
from benchmarks.memory import in_own_process, peak_gb
from ppl_diffusion.denoisers.topk import LatentMixture, top_k_latents
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_from_hidden, uniform_nelbo_terms
from ppl_diffusion.processes.duality import DuoSchedule

TAU, NUM_LARGEST = 1e-3, 3
MEMORY_GOAL, GRADIENT_GOAL = 0.5, 1e-5
OURS, STRAIGHTFORWARD = "ours", "straightforward"


@dataclass(frozen=True)
class Setting:
    """Sizes of a training step.

    :param rows: positions in a batch, ``B L``.
    :param vocab_size: ``V``.
    :param width: size ``D`` of embedding and hidden states.
    """

    rows: int
    vocab_size: int = 50_257
    width: int = 128


class Batch(nn.Module):
    """A small network and one batch: the same numbers for every method and dtype.

    :param setting: the sizes.
    :param dtype: of all floats of the network.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        size, width, self.size = setting.vocab_size, setting.width, setting.vocab_size
        self.embedding = nn.Embedding(size, width)
        self.network = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head = nn.Linear(width, size)
        schedule, t = DuoSchedule(size), 0.02 + 0.96 * torch.rand(setting.rows).double()
        self.x0 = torch.randint(size, (setting.rows,))
        self.mu, self.alpha = schedule.mu(t), schedule.alpha(t)
        self.slope = schedule.alpha_prime(t)
        kept = torch.rand(setting.rows) < self.alpha
        self.z = torch.where(kept, self.x0, torch.randint(size, (setting.rows,)))
        self.to(dtype)

    def mixture(self) -> LatentMixture:
        """Draw the largest latent entries, the same ones at every call."""
        generator = torch.Generator().manual_seed(1)
        uniforms = torch.rand(
            (2 * NUM_LARGEST + 1, len(self.x0)), dtype=torch.float64, generator=generator
        )
        return top_k_latents(self.x0, self.mu, self.size, uniforms, k=NUM_LARGEST, tau=TAU)

    def dense_bound(self, hidden: Tensor, z: Tensor) -> Tensor:
        """Return the published form of the bound (Duo, Eq. 17), all tables in the head's dtype."""
        size, dtype = self.size, hidden.dtype
        a, slope = self.alpha.to(dtype), self.slope.to(dtype)
        c = self.head(hidden).log_softmax(-1).exp()
        y = size * a[:, None] * c + 1 - a[:, None]
        y_z, y_x = (y.gather(-1, ids[:, None])[:, 0] for ids in (z, self.x0))
        kept = (z == self.x0).to(dtype)
        moved, k0 = 1 - kept, (1 - a) / (size * a + 1 - a)
        x_z = torch.where(z == self.x0, size * a + 1 - a, 1 - a)
        inner = (
            size / x_z
            - size / y_z
            + (k0 * kept + moved) * (y.log().sum(-1) - size * y_z.log())
            + size * a / (1 - a) * moved * (y_x.log() - y_z.log())
            - ((size - 1) * k0 * kept - moved / k0) * k0.log()
        )
        return (slope / (size * a) * inner).mean()

    def fused_bound(self, hidden: Tensor, z: Tensor) -> Tensor:
        """Return our form of it, the head included."""
        return uniform_nelbo_from_hidden(
            hidden, self.head, self.x0, z, self.alpha, self.slope
        ).mean()


def nelbo_dense(batch: Batch) -> Tensor:
    """Bound discrete states on dense tables."""
    return batch.dense_bound(batch.network(batch.embedding(batch.z)), batch.z)


def nelbo_fused(batch: Batch) -> Tensor:
    """Bound discrete states with the head fused in."""
    return batch.fused_bound(batch.network(batch.embedding(batch.z)), batch.z)


def nelbo_from_logits(batch: Batch) -> Tensor:
    """Bound discrete states from logits that the caller holds."""
    logits = batch.head(batch.network(batch.embedding(batch.z)))
    return uniform_nelbo_terms(batch.x0, batch.z, logits, batch.alpha, batch.slope).mean()


def curriculum_dense(batch: Batch) -> Tensor:
    """Draw and mix the whole vocabulary."""
    signal = batch.mu / (1 + batch.mu**2).sqrt()
    latent = (1 - signal**2).sqrt()[:, None].float() * torch.randn(len(batch.x0), batch.size)
    latent.scatter_add_(-1, batch.x0[:, None], signal[:, None].float())
    soft = (latent / TAU).softmax(-1) @ batch.embedding.weight
    return batch.dense_bound(batch.network(soft), latent.argmax(-1))


def curriculum_published(batch: Batch) -> Tensor:
    """Draw and mix the largest entries as the efficient curriculum was published (Duo++).

    The other entries behind the ``k``-th are one number, their mean; one of them is forgotten where
    the token's own entry is among the largest, and the state is then the token even where another
    entry is larger: cheaper than the law, and not quite it.
    """
    k, others, rows = NUM_LARGEST, batch.size - 1, len(batch.x0)
    signal = batch.mu / (1 + batch.mu**2).sqrt()
    noise = (1 - signal**2).sqrt()[:, None]
    drawn = torch.rand(rows, k, dtype=torch.float64)
    # The largest of many uniforms, one after another.
    sums = (drawn.log() / (others - torch.arange(k))).cumsum(-1)
    largest = -torch.special.ndtri(-torch.expm1(sums))
    own = (signal[:, None] / noise) + torch.randn(rows, 1, dtype=torch.float64)
    ids = _distinct(others, rows, k)
    ids = ids + (ids >= batch.x0[:, None])
    inside = own > largest[:, -1:]
    token = batch.x0[:, None]
    kept = torch.where(inside, torch.cat([token, ids[:, :-1]], -1), ids)
    values = torch.where(inside, torch.cat([own, largest[:, :-1]], -1), largest)
    last = torch.where(inside[:, 0], largest[:, -2], largest[:, -1])
    s = noise[:, 0] / TAU
    tail = s**2 / 2 + torch.special.log_ndtr(last - s) - torch.special.log_ndtr(last)
    terms = torch.cat([s[:, None] * values, (tail + math.log(others - k))[:, None]], -1)
    weights = terms.softmax(-1)[:, :k].to(batch.embedding.weight.dtype)
    table = batch.embedding.weight
    soft = F.embedding_bag(kept, table, per_sample_weights=weights, mode="sum")
    return batch.dense_bound(batch.network(soft), kept[:, 0])


def _distinct(num: int, rows: int, k: int) -> Tensor:
    """Return ``k`` distinct numbers below ``num`` per row (Floyd)."""
    chosen = torch.empty(rows, 0, dtype=torch.int64)
    for top in range(num - k, num):
        new = torch.randint(top + 1, (rows, 1))
        new = torch.where((chosen == new).any(-1, keepdim=True), top, new)
        chosen = torch.cat([chosen, new], -1)
    return chosen


def curriculum_largest(batch: Batch) -> Tensor:
    """Draw and mix the largest entries."""
    mixture = batch.mixture()
    soft = F.embedding_bag(
        mixture.ids,
        batch.embedding.weight,
        per_sample_weights=mixture.weights.to(batch.embedding.weight.dtype),
        mode="sum",
    )
    return batch.fused_bound(batch.network(soft), mixture.tokens)


def curriculum_scattered(batch: Batch) -> Tensor:
    """Mix the same largest entries as a dense table; only to compare gradients."""
    mixture = batch.mixture()
    weights = torch.zeros(len(batch.x0), batch.size, dtype=batch.embedding.weight.dtype)
    weights.scatter_(-1, mixture.ids, mixture.weights.to(weights.dtype))
    return batch.dense_bound(batch.network(weights @ batch.embedding.weight), mixture.tokens)


Step = Callable[[Batch], Tensor]
NELBO, FROM_LOGITS = "uniform-nelbo", "uniform-nelbo from logits"
CURRICULUM, OVER_DENSE = "curriculum", "curriculum over dense"


@dataclass(frozen=True)
class Loss:
    """A loss in ours and a published form, and the dense form on the same draws as ours."""

    ours: Step
    straightforward: Step
    reference: Step
    goal: float | None


LOSSES = {
    NELBO: Loss(nelbo_fused, nelbo_dense, nelbo_dense, MEMORY_GOAL),
    FROM_LOGITS: Loss(nelbo_from_logits, nelbo_dense, nelbo_dense, None),
    CURRICULUM: Loss(curriculum_largest, curriculum_published, curriculum_scattered, MEMORY_GOAL),
    OVER_DENSE: Loss(curriculum_largest, curriculum_dense, curriculum_scattered, MEMORY_GOAL),
}


def take_step(step: Step, batch: Batch) -> None:
    """Go forward and backward.

    :param step: the loss.
    :param batch: network and data; gradients of earlier steps are dropped.
    """
    batch.zero_grad(set_to_none=True)
    step(batch).backward()


def step_memory(step: Step, setting: Setting) -> float:
    """Return how many GB a step adds to the peak of this process.

    :param step: the loss.
    :param setting: the sizes.
    """
    take_step(step, Batch(Setting(rows=8, vocab_size=50, width=8)))  # loads what is loaded lazily
    batch = Batch(setting)
    before = peak_gb()
    take_step(step, batch)
    return peak_gb() - before


def step_seconds(loss: Loss, setting: Setting, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every repeat, the two forms by turns after one warm-up each.

    :param loss: the loss.
    :param setting: the sizes.
    :param repeats: timed steps of each form.
    """
    batch = Batch(setting)
    forms = {OURS: loss.ours, STRAIGHTFORWARD: loss.straightforward}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(1 + repeats):
        for name, step in forms.items():
            started = time.perf_counter()
            take_step(step, batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def gradient_difference(loss: Loss, setting: Setting) -> float:
    """Return the largest difference of a gradient from float64, in units of its largest entry.

    :param loss: the loss.
    :param setting: the sizes; the float64 reference holds several tables of it.
    """
    found, exact = Batch(setting), Batch(setting, torch.float64)
    take_step(loss.ours, found)
    take_step(loss.reference, exact)
    return max(
        float((p.grad - q.grad).abs().max() / q.grad.abs().max())
        for p, q in zip(found.parameters(), exact.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    )


def speed_and_accuracy(
    loss: Loss, setting: Setting, repeats: int, small: Setting
) -> tuple[dict[str, list[float]], float]:
    """Return :func:`step_seconds` at one size and :func:`gradient_difference` at a smaller one."""
    return step_seconds(loss, setting, repeats), gradient_difference(loss, small)


def measure(quick: bool, console: Console) -> list[Row]:
    """Measure memory and time of the losses of a uniform prior.

    :param quick: fewer rows and repeats.
    :param console: where the table goes.
    """
    setting, repeats = (Setting(512), 2) if quick else (Setting(2048), 5)
    rows = []
    for name in LOSSES:
        rows += measure_loss(name, setting, repeats, Setting(64 if quick else 256))
        console.print(f"{name}: done")
    _print(rows, setting, console)
    return rows


def measure_loss(name: str, setting: Setting, repeats: int, small: Setting) -> list[Row]:
    """Measure one loss.

    :param name: its name.
    :param setting: sizes for memory and time.
    :param repeats: timed steps.
    :param small: sizes for the comparison of gradients.
    """
    loss, n = LOSSES[name], repeats
    where = {"loss": name, "vocab_size": setting.vocab_size, "num_rows": setting.rows}
    memory = {
        OURS: in_own_process(step_memory, loss.ours, setting),
        STRAIGHTFORWARD: in_own_process(step_memory, loss.straightforward, setting),
    }
    seconds, error = in_own_process(speed_and_accuracy, loss, setting, repeats, small)
    ratios = [a / b for a, b in zip(seconds[OURS], seconds[STRAIGHTFORWARD], strict=True)]
    rows = [
        Row("memory_ratio", memory[OURS] / memory[STRAIGHTFORWARD], "ratio", 1, loss.goal, where),
        Row("time_ratio", statistics.median(ratios), "ratio", n, None, where),
        Row(
            "gradient_difference",
            error,
            "relative",
            1,
            GRADIENT_GOAL,
            {**where, "num_rows": small.rows},
        ),
    ]
    for method in (OURS, STRAIGHTFORWARD):
        there = {**where, "method": method}
        rows.append(Row("step_memory", memory[method], "GB", 1, None, there))
        rows.append(Row("step_time", statistics.median(seconds[method]), "s", n, None, there))
    return rows


def _print(rows: list[Row], setting: Setting, console: Console) -> None:
    made = table(
        f"One training step, V = {setting.vocab_size:,}, {setting.rows:,} positions",
        ["loss", "ours", "straightforward", "ratio", "goal"],
        "memory: GB that the step adds to the peak; time: seconds, forward and backward",
    )
    for name in LOSSES:
        own = [row for row in rows if row.coordinates["loss"] == name]
        for label, unit in (("memory", "step_memory"), ("time", "step_time")):
            (ratio,) = (row for row in own if row.name == f"{label}_ratio")
            values = (f"{row.value:.3f}" for row in own if row.name == unit)
            made.add_row(f"{name}, {label}", *values, f"{ratio.value:.3f}", verdict(ratio))
        (error,) = (row for row in own if row.name == "gradient_difference")
        made.add_row(f"{name}, gradients", "", "", f"{error.value:.1e}", verdict(error))
    console.print(made)


if __name__ == "__main__":
    run(measure)
