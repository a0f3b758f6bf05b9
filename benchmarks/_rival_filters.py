"""The filter of a hidden Markov model by libraries that want an environment of their own.

Run by the Python of that environment it answers requests, a line of JSON each; of the packages here
it needs only NumPy and the library it is asked for. The arithmetic is that of
:mod:`benchmarks._filters`; ``blackjax`` resamples before every step, which is what its step does.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Tables = Mapping[str, Any]
"""Running sums of the first law ``(S,)`` and of the moves ``(S, S)``, and ``log_g (T, S)``."""

Run = Callable[[int], float]
"""``seed -> log evidence``."""


def by_particles(tables: Tables, num_particles: int) -> Run:
    """Filter by ``particles``, on its lower floor, which does no more than it is told."""
    import particles

    start, following, log_g = (tables[name] for name in ("start", "following", "log_g"))
    uniforms = np.random.random_sample

    class Bootstrap(particles.FeynmanKac):  # type: ignore[misc]
        def M0(self, N: int) -> Any:
            return (uniforms(N)[:, None] >= start[:-1]).sum(-1)

        def M(self, t: int, xp: Any) -> Any:
            return (uniforms(len(xp))[:, None] >= following[xp][:, :-1]).sum(-1)

        def logG(self, t: int, xp: Any, x: Any) -> Any:
            return log_g[t][x]

    def run(seed: int) -> float:
        np.random.seed(seed)  # noqa: NPY002 (its resamplers draw from the global state)
        model = Bootstrap(len(log_g))
        smc = particles.SMC(fk=model, N=num_particles, resampling="systematic", ESSrmin=0.5)
        smc.run()
        return float(smc.logLt)

    return run


def by_blackjax(tables: Tables, num_particles: int) -> Run:
    """Filter by the step under all samplers of ``blackjax``, in a compiled scan."""
    import jax
    import jax.numpy as jnp
    from blackjax.smc import base, resampling

    start, following, log_g = (jnp.asarray(tables[n]) for n in ("start", "following", "log_g"))

    def step(state: Any, x: Any) -> Any:
        k, key, worth = x

        def move(keys: Any, states: Any, _: Any) -> Any:
            ends = jnp.where(k > 0, following[states], start)
            return (jax.vmap(jax.random.uniform)(keys)[:, None] >= ends[:, :-1]).sum(-1), None

        state, info = base.step(key, state, move, lambda x: worth[x], resampling.systematic)
        return state, info.log_likelihood_increment

    @jax.jit
    def evidence(key: Any) -> Any:
        state = base.init(jnp.zeros(num_particles, int), None)
        xs = jnp.arange(len(log_g)), jax.random.split(key, len(log_g)), log_g
        return jax.lax.scan(step, state, xs)[1].sum()

    return lambda seed: float(evidence(jax.random.key(seed)))


LIBRARIES = {"particles": by_particles, "blackjax": by_blackjax}


def installed() -> list[str]:
    """Return which of the libraries can be imported."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def main() -> None:
    """Answer ``{"tables": ...}`` with what is here, and a run with its time and its evidence."""
    tables: dict[str, Any] = {}
    runs: dict[tuple[str, int], Run] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "tables" in request:
            tables = {name: np.asarray(value) for name, value in request["tables"].items()}
            answer: dict[str, Any] = {"libraries": installed()}
        else:
            key = request["library"], request["num_particles"]
            if key not in runs:
                runs[key] = LIBRARIES[key[0]](tables, key[1])
            started = time.process_time()
            evidence = runs[key](request["seed"])
            answer = {"seconds": time.process_time() - started, "evidence": evidence}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
