"""Anchored moves with exact weights on the measured toy: what tokens and look-ahead are worth.

Four sites of four codes under a Markov prior, seen through averages with noise; 256 sequences, so
that evidences and posteriors are known. Every variant, with and without the guide's tokens and the
moment-matched look-ahead, against the law that it declares: the mean of ``Z_hat / Z``, its
coefficient of variation, the effective share of the particles, and the total variation of all
particles of all runs. Last, picks by value whose order nobody pays for, which must miss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._report import Row, run, table
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, AnchoredSMC, Bootstrap, Method, QuantisedExpectation
from ppl_diffusion.inference.anchored_guidance import Guided
from ppl_diffusion.inference.anchored_steps import values_move
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.programs.sources import Rng
from ppl_diffusion.testing import ExactChain, total_variation
from ppl_diffusion.testing.anchored_toys import MeasuredToy, measured_toy

SIZE = 200
GOAL_BIAS = 4.0
"""The goal: standard errors between the mean of ``Z_hat / Z`` and one."""


class Unpaid(AnchoredSMC):
    """Picks sites by their tokens and forgets to pay for the order."""

    def _move(self, step: Any, guided: Guided, generator: Rng) -> tuple[Tensor, Tensor]:
        conf = guided.log_c / self.tau
        picked = values_move(step, guided.log_c, conf, self.delta, generator)
        return picked.value, picked.log_tokens


@dataclass(frozen=True)
class Case:
    """A sampler and what it is compared with.

    :param law: name of the chain's law: ``"p_T"`` (four steps of a grid) or ``"p"``.
    """

    name: str
    law: str
    method: Method
    wrong: bool = False


def cases() -> list[Case]:
    """Return the rows of the table."""
    made = []
    for variant, law in (("independent", "p_T"), ("policy", "p"), ("values", "p")):
        if variant != "values":
            made.append(Case(f"bootstrap, {law}", law, Bootstrap(twist=None)))
        for name, twist, floor in (
            ("", None, 0.0),
            (" + twist", "moments", 0.0),
            (" + twist, floor .2", "moments", 0.2),
        ):
            method = AnchoredSMC(variant=variant, twist=twist, floor=floor)  # type: ignore[arg-type]
            made.append(Case(variant + name, law, method))
    no_floor = AnchoredSMC(variant="values", delta=0.0, floor=0.0)
    made.append(Case("values + twist, delta 0", "p", no_floor))
    last = QuantisedExpectation(keep="last")
    unpaid = Unpaid(variant="values", delta=0.0, tau=0.5, expectation=last)
    return [*made, Case("WRONG: values, order unpaid", "p", unpaid, wrong=True)]


def chain_of(toy: MeasuredToy, law: str) -> ReverseChain:
    """Return the chain with a law."""
    if law == "p_T":
        return ReverseChain(InterpolatingKernel(toy.process, toy.denoiser, num_steps=4), 4)
    return ReverseChain(OrderedKernel(toy.process, toy.denoiser, length=4), 4)


def measure_case(case: Case, toy: MeasuredToy, num_runs: int) -> Row:
    """Return one row of the table."""
    chain = chain_of(toy, case.law)
    prior = ExactChain.of(chain).x0_law() if case.law == "p_T" else toy.log_prior.exp()
    weight = prior * toy.log_g.exp()
    options: dict[str, Any] = {"num_particles": SIZE, "num_runs": num_runs, "store_path": False}
    started = time.process_time()
    found = SMC(chain, toy.potential, method=case.method, **options).run(seed=1)
    seconds = time.process_time() - started
    ratio = found.log_evidence.exp() / weight.sum()
    error = float(ratio.std()) / math.sqrt(num_runs)
    share = float((-(2 * found.log_weights).logsumexp(-1)).exp().mean()) / SIZE
    counts = torch.zeros(len(prior), dtype=torch.float64)
    each = found.log_weights.exp().flatten() / num_runs
    counts.index_add_(0, toy.index(found.x0).flatten(), each)
    where = {
        "sampler": case.name,
        "law": case.law,
        "mean": float(ratio.mean()),
        "mean_se": error,
        "cv": float(ratio.std() / ratio.mean()),
        "ess": share,
        "tv": total_variation(counts, weight / weight.sum()),
        "seconds": seconds,
    }
    bias = abs(float(ratio.mean()) - 1) / error
    goal = None if case.wrong else GOAL_BIAS
    return Row("anchored_bias", bias, "standard errors", num_runs, goal, where)


def measure(quick: bool, console: Console) -> Iterator[Row]:
    """Measure evidences of anchored samplers against enumeration."""
    toy, num_runs = measured_toy(), 400 if quick else 4000
    rows = [measure_case(case, toy, num_runs) for case in cases()]
    columns = ["sampler", "law", "Z^/Z", "s.e.", "CV", "ESS/N", "TV", "CPU s", ""]
    grid = ExactChain.of(chain_of(toy, "p_T")).evidence(toy.potential)
    caption = f"The evidence of p_T is {grid / math.exp(toy.log_evidence):.3f} times that of p."
    title = f"Evidence on the measured toy, N = {SIZE}, {num_runs} runs"
    made = table(title, columns, caption)
    for row in rows:
        c = row.coordinates
        numbers = [f"{c[name]:.3f}" for name in ("mean", "mean_se", "cv", "ess", "tv")]
        met = "" if row.ok is None else ("met" if row.ok else "missed")
        made.add_row(c["sampler"], c["law"], *numbers, f"{c['seconds']:.1f}", met)
    console.print(made)
    return iter(rows)


if __name__ == "__main__":
    run(measure)
