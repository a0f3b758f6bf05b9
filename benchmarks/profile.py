"""Where the time of the demo goes: ``ppl-diffusion design yeast-promoter``, by share.

Functions are wrapped with one clock that always runs for exactly one part, so that the shares add
up to all of the process time (one thread; the quick form has a sixth of the particles). Phases are
``engine`` (the steered run), ``prior samples``, ``judging`` (scores of designs and prior, and how
they compare), ``plots``, ``files``, ``start-up`` (imports) and ``rest`` (loading, printing).
``phase_share`` is all of a phase. In ``share`` the network and the oracles are parts of their own,
whoever asks them, and a phase is what it costs without them. ``rotation`` is what attention does
besides its linear maps and the attention itself: it turns queries and keys and lays them out. It
is part of ``network``, and left out when shares are summed.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._clock import Clock, replaced
from benchmarks._report import Row, run, table

PRIOR = "yeast-promoter"
ENGINE, REST, START = "engine", "rest", "start-up"
NETWORK, ROTATION, ORACLE = "network", "rotation", "oracle"
PHASES = {
    "infer": ENGINE,
    "_prior_samples": "prior samples",
    "scores": "judging",
    "compare": "judging",
    "_collapse": "judging",
    "save_plots": "plots",
    "save_arviz": "files",
}
"""Functions of ``ppl_diffusion.designs.run`` by the phase that they are."""


def watch(clock: Clock, stack: ExitStack) -> None:
    """Wrap everything that is told apart.

    :param clock: the clock.
    :param stack: what unwraps it again.
    """
    from torch.nn import functional

    from ppl_diffusion.denoisers._blocks import Attention
    from ppl_diffusion.denoisers.transformer import Transformer
    from ppl_diffusion.designs import run as design
    from ppl_diffusion.models.oracles import Oracle

    def wrap(owner: Any, name: str, *part: Any) -> None:
        stack.enter_context(replaced(owner, name, lambda own: clock.timed(own, *part)))

    for name, phase in PHASES.items():
        wrap(design, name, phase, "")
    for name in ("forward", "hidden", "hidden_mixture", "head"):
        wrap(Transformer, name, None, NETWORK)
    wrap(Attention, "forward", None, ROTATION, NETWORK)
    for name in ("linear", "scaled_dot_product_attention"):
        wrap(functional, name, None, NETWORK, ROTATION)
    wrap(Oracle, "predict", None, ORACLE)


def profile(quick: bool) -> Clock:
    """Run the demo under a clock.

    :param quick: a sixth of the particles.
    """
    clock = Clock(START)
    import torch

    from ppl_diffusion.commands.designing import Options, run_design
    from ppl_diffusion.designs.flags import Asked

    torch.set_num_threads(1)
    with ExitStack() as stack:
        watch(clock, stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "demo"
        search = {"num_particles": 12 if quick else None}
        stack.enter_context(clock.running(REST, ""))
        run_design(PRIOR, Asked(), search, Options(folder, quiet=True))
    clock.stop()
    return clock


def shares(clock: Clock) -> Iterator[Row]:
    """Return the share of every part, the largest first; rotation comes last.

    :param clock: a clock that has stopped.
    """
    parts: Counter[str] = Counter()  # type: ignore[assignment]
    for (phase, work), seconds in clock.seconds.items():
        name = NETWORK if work == ROTATION else work or phase
        parts[name] += seconds  # type: ignore[assignment]
    phases: Counter[str] = Counter()  # type: ignore[assignment]
    for (phase, _), seconds in clock.seconds.items():
        phases[phase] += seconds  # type: ignore[assignment]
    rotation = sum(s for (_, work), s in clock.seconds.items() if work == ROTATION)
    for name, seconds in [*parts.most_common(), (ROTATION, rotation)]:
        where: dict[str, Any] = {"part": name, "seconds": seconds}
        within = {"within": NETWORK} if name == ROTATION else {}
        yield Row("share", seconds / clock.total, "share", 1, None, {**where, **within})
    for name, seconds in phases.most_common():
        where = {"phase": name, "seconds": seconds}
        yield Row("phase_share", seconds / clock.total, "share", 1, None, where)


def measure(quick: bool, console: Console) -> list[Row]:
    """Profile the demo.

    :param quick: a sixth of the particles.
    :param console: where the tables go.
    """
    clock = profile(quick)
    rows = list(shares(clock))
    made = table(
        f"The demo by share, {clock.total:.1f} s of process time, one thread",
        ["", "s", "share"],
        "rotation is part of the network; all others add up to 100 %",
    )
    for row in rows:
        if row.name != "share":
            continue
        name = row.coordinates["part"]
        told = f"of it {name}" if name == ROTATION else name
        made.add_row(told, f"{row.coordinates['seconds']:.2f}", f"{row.value:.1%}")
    console.print(made)
    _print_phases(clock, console)
    return rows


def _print_phases(clock: Clock, console: Console) -> None:
    made = table(
        "Seconds by phase", ["", "all", "network", "of it rotation", "oracle", "without them"]
    )
    for phase in dict.fromkeys(phase for phase, _ in clock.seconds):
        own = {work: s for (where, work), s in clock.seconds.items() if where == phase}
        rotation = own.get(ROTATION, 0.0)
        parts = (sum(own.values()), own.get(NETWORK, 0.0) + rotation, rotation)
        rest = (own.get(ORACLE, 0.0), own.get("", 0.0))
        made.add_row(phase, *(f"{seconds:.2f}" for seconds in (*parts, *rest)))
    console.print(made)


if __name__ == "__main__":
    run(measure)
