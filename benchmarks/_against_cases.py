"""What :mod:`benchmarks.against` runs on two trees: by public names only that both have.

Run as a script it serves requests from standard input, one line each: ``{"case": name, "seed": 0}``
is answered by ``{"seconds": process time, "evidence": number or null}``, with ``"memory": true``
also by ``"memory"``, the GB that this run added to the peak of the process. Every twist is named,
since defaults changed.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion import models
from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.denoisers.transformer import Transformer, TransformerConfig
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.resampling import as_resampler

PRIOR, ORACLE = "yeast-promoter", "yeast-oracle-design"
Work = Callable[[int], "float | None"]


class Trivial:
    """A network that costs nothing: the same logits everywhere."""

    kind, time_free = "cavity", True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.logits = torch.log_softmax(-torch.arange(1.0, vocab_size + 1).log(), -1)

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def share_of_fourths(x0: Tensor) -> Tensor:
    """A log-potential that costs nothing: four times the share of tokens divisible by four."""
    return (x0 % 4 == 0).sum(-1) * (4.0 / x0.shape[-1])


def trivial_chain(length: int, num_steps: int, vocab_size: int) -> ReverseChain:
    """A masked chain around a network that costs nothing."""
    kernel = InterpolatingKernel(Absorbing(vocab_size), Trivial(vocab_size), num_steps=num_steps)
    return ReverseChain(kernel, length)


def steering(chain: ReverseChain, potential: Any, size: int, twist: Any, **options: Any) -> Work:
    """A steered run, whose evidence is told."""
    model = FeynmanKac(chain, potential, twist=twist)

    def work(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return float(run_smc(model, size, generator=generator, **options).log_evidence[0])

    return work


def network_forward(num_rows: int, chunked: bool) -> Work:
    """The shipped network on half-masked rows, as runs ask it or as a bare module."""
    network = models.load(PRIOR).chain(num_steps=64).kernel.denoiser
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (num_rows, 80), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.5] = 4

    def work(seed: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                (EvaluatedDenoiser(network) if chunked else network)(tokens, 0.5)

    return work


def shipped_run(size: int, num_steps: int) -> Work:
    """The shipped prior, steered by the shipped oracle."""
    oracle = models.load_oracle(ORACLE)
    return steering(
        models.load(PRIOR).chain(num_steps=num_steps),
        lambda x0: oracle.predict(x0)[0].clamp(max=17.0) / 0.4,
        size,
        "argmax",
    )


def large_vocabulary(size: int, length: int, num_steps: int) -> Work:
    """A small network with a vocabulary of 20,000, which computes the head where it is asked."""
    torch.manual_seed(0)
    config = TransformerConfig(20_000, 20_001, length, dim=32, depth=1, heads=2)
    network = Transformer(config).eval().requires_grad_(False)
    torch.nn.init.normal_(network.vocabulary.weight, std=0.3)
    kernel = InterpolatingKernel(Absorbing(20_000), network, num_steps=num_steps)
    return steering(ReverseChain(kernel, length), share_of_fourths, size, "argmax")


def chain_alone(size: int, length: int, num_steps: int) -> Work:
    """A masked chain without anything else."""
    chain = trivial_chain(length, num_steps, 4)

    def work(seed: int) -> None:
        chain.sample((size,), generator=torch.Generator().manual_seed(seed))

    return work


def resampling(name: str, size: int) -> Work:
    """One call of a resampler."""
    scheme, generator = as_resampler(name), torch.Generator().manual_seed(0)
    log_weights = 2 * torch.randn(1, size, generator=generator, dtype=torch.float64)
    shape = (1, scheme.num_uniforms(size))
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)

    def work(seed: int) -> None:
        for _ in range(1 if name == "ssp" else 50):
            scheme(uniforms, log_weights)

    return work


def engine(twist: Any, num_steps: int = 64) -> Work:
    """The engine above a network that costs nothing, at N = L = 64, V = 4."""
    return steering(trivial_chain(64, num_steps, 4), share_of_fourths, 64, twist)


def populous(vocab_size: int, length: int, num_steps: int) -> Work:
    """4,096 particles above a network that costs nothing."""
    chain = trivial_chain(length, num_steps, vocab_size)
    return steering(chain, share_of_fourths, 4096, "argmax")


BUILD: dict[str, Callable[[], Work]] = {
    "forward, 180 rows": lambda: network_forward(180, True),
    "bare module, 180 rows": lambda: network_forward(180, False),
    "bare module, 64 rows": lambda: network_forward(64, False),
    "steered run": lambda: shipped_run(512, 64),
    "steered run, quick": lambda: shipped_run(128, 64),
    "V=20,000": lambda: large_vocabulary(32, 32, 8),
    "V=4, N=4,096": lambda: populous(4, 64, 64),
    "V=4, N=4,096, quick": lambda: populous(4, 32, 16),
    "V=256, N=4,096": lambda: populous(256, 8, 8),
    "ssp": lambda: resampling("ssp", 4096),
    "systematic": lambda: resampling("systematic", 4096),
    "killing": lambda: resampling("killing", 4096),
    "chain.sample": lambda: chain_alone(64, 64, 64),
    "engine, no twist": lambda: engine(None),
    "engine, argmax": lambda: engine("argmax"),
    "engine, persistent": lambda: engine("persistent"),
    "engine, sample": lambda: engine("sample"),
    "engine, argmax, T=256": lambda: engine("argmax", 256),
    "engine, argmax, T=1,024": lambda: engine("argmax", 1024),
}
"""How each case is made; making it is not timed."""


def reset_peak() -> None:
    """Forget the largest size of this process, where the system lets one."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")


def status_gb(name: str) -> float:
    """A line of ``/proc/self/status``, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024 / 1e9


def answer(request: dict[str, Any], made: dict[str, Work]) -> dict[str, Any]:
    """Run what is asked for."""
    name = request["case"]
    if name not in made:
        made[name] = BUILD[name]()
        if not request.get("memory"):
            made[name](0)  # what is built on first use is not timed
    before = 0.0
    if request.get("memory"):
        reset_peak()
        before = status_gb("VmRSS")
    started = time.process_time()
    evidence = made[name](request["seed"])
    found = {"seconds": time.process_time() - started, "evidence": evidence}
    if request.get("memory"):
        found["memory"] = max(status_gb("VmHWM") - before, 1e-3)
    return found


def serve() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a twist that is not the best is measured too
    made: dict[str, Work] = {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), made)), flush=True)


if __name__ == "__main__":
    serve()
