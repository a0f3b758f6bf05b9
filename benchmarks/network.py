"""How fast the shipped network is, and whether it is asked about the right number of rows.

``ms_per_row`` is the processor time of one row of a call, against the rows of the call; the rows
that the library sends at once come from the machine's cache, not from a clock, and
``chosen_over_best`` says what that choice loses to the best of the table. ``rotation_over_plain``
compares attention with its plain form (queries and keys permuted, then rotated half by half).
``share_of_peak`` is the speed of the network over that of its own matrix products alone.
On an accelerator, where there is one, the same table follows with wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from benchmarks._report import Row, run, table, verdict
from ppl_diffusion import models
from ppl_diffusion.denoisers._blocks import Attention
from ppl_diffusion.denoisers.transformer import Transformer

PRIOR = "yeast-promoter"
ROWS = (8, 16, 32, 64, 128, 180, 256, 512, 1024)
CHOICE_GOAL = 1.15  # a tenth is noise on a busy machine
ROTATION_GOAL = 0.9


def shipped(name: str = PRIOR) -> Transformer:
    """Return the network of a shipped prior."""
    network = models.load(name).chain(num_steps=1).kernel.denoiser
    assert isinstance(network, Transformer)
    return network


def plain_attention(layer: Attention, state: Tensor, rotation: Tensor) -> Tensor:
    """Attention with the plain rotation, the baseline.

    :param layer: whose weights are used.
    :param state: float32 ``(rows, L, dim)``.
    :param rotation: cosines and sines, ``(L, width / 2, 2)``.
    """
    rows, length, dim = state.shape
    split = layer.inputs(state).reshape(rows, length, 3, layer.heads, dim // layer.heads)
    query, key, value = split.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(_turn(query, rotation), _turn(key, rotation), value)
    output: Tensor = layer.output(mixed.transpose(1, 2).reshape(rows, length, dim))
    return output


def _turn(x: Tensor, rotation: Tensor) -> Tensor:
    (even, odd), (cosine, sine) = x.chunk(2, dim=-1), rotation.unbind(-1)
    return torch.cat([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)


def states(network: Transformer, rows: int) -> Tensor:
    """Return random states, int64 ``(rows, L)``."""
    shape = (rows, network.config.max_length)
    tokens = torch.randint(
        network.config.num_states, shape, generator=torch.Generator().manual_seed(0)
    )
    return tokens.to(network.vocabulary.weight.device)


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time cases in turn, so that a busy machine slows all of them alike.

    :param cases: what to time.
    :param repeats: rounds after one to warm up.
    :param clock: reads seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(repeats + 1):
        for name, case in cases.items():
            started = clock()
            case()
            if index:
                seconds[name].append(clock() - started)
    return seconds


def products(network: Transformer, rows: int) -> Callable[[], None]:
    """Return the matrix products of a forward pass and nothing else, as plain products."""
    c = network.config
    tokens, width = rows * c.max_length, c.dim // c.heads
    shapes = [(c.dim, 3 * c.dim), (c.dim, c.dim), (c.dim, wide := round(c.mlp_ratio * c.dim))]
    pairs = [
        (torch.randn(tokens, a), torch.randn(b, a)) for a, b in [*shapes, (wide, c.dim)] * c.depth
    ]
    pairs.append((torch.randn(tokens, c.dim), torch.randn(c.vocab_size, c.dim)))
    key = torch.randn(rows * c.heads, c.max_length, width)
    scores = torch.randn(rows * c.heads, c.max_length, c.max_length)

    def multiply() -> None:
        for x, weight in pairs:
            F.linear(x, weight)
        for _ in range(c.depth):
            torch.bmm(key, key.mT)
            torch.bmm(scores, key)

    return multiply


def flops(network: Transformer) -> float:
    """Return the multiplications and additions of one row's matrix products."""
    c = network.config
    layers = 4 * c.dim + 2 * round(c.mlp_ratio * c.dim)
    per_token = c.depth * c.dim * (layers + 2 * c.max_length) + c.dim * c.vocab_size
    return 2.0 * c.max_length * per_token


def rows_rows(network: Transformer, counts: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """Yield the time of one row against the rows of a call, and what the choice loses."""
    device = network.vocabulary.weight.device
    chosen = network.rows_per_call(network.config.max_length)
    sizes = sorted({*counts, min(chosen, 2 * max(counts))})
    tokens = states(network, max(sizes))
    clock = time.process_time if device.type == "cpu" else _wall

    def case(rows: int) -> Callable[[], object]:
        # As many rows each: a small call is timed as often as makes up for its size.
        times = max(1, min(sizes[-1], 256) // rows)
        return lambda: [network(tokens[:rows], 0.5) for _ in range(times)]

    seconds = interleaved({str(n): case(n) for n in sizes}, repeats, clock)
    per_row = {
        n: 1e3 * median(seconds[str(n)]) / (n * max(1, min(sizes[-1], 256) // n)) for n in sizes
    }
    shared = {"device": device.type, "threads": torch.get_num_threads()}
    for n in sizes:
        own = {"rows": n, "chosen": n == chosen, **shared}
        yield Row("ms_per_row", per_row[n], "ms", repeats, None, own)
    at = min(chosen, max(sizes))
    lost = per_row[at] / min(per_row.values())
    yield Row("chosen_over_best", lost, "ratio", repeats, CHOICE_GOAL, {"rows": chosen, **shared})


def part_rows(network: Transformer, rows: int, repeats: int) -> Iterator[Row]:
    """Yield attention against its plain form, and the network against its products alone."""
    layer = network.blocks[0].branches[0]  # type: ignore[union-attr, index]
    assert isinstance(layer, Attention)
    tokens = states(network, rows)
    state, rotation = network.stem(tokens), network.rotation[: tokens.shape[-1]]
    seconds = interleaved(
        {
            "new": lambda: layer(state, rotation),
            "plain": lambda: plain_attention(layer, state, rotation),
            "network": lambda: network(tokens, 0.5),
            "products": products(network, rows),
        },
        repeats,
        time.process_time,
    )
    took = {name: median(found) for name, found in seconds.items()}
    where = {"rows": rows, "threads": torch.get_num_threads()}
    ratio = took["new"] / took["plain"]
    yield Row("rotation_over_plain", ratio, "ratio", repeats, ROTATION_GOAL, where)
    yield Row("share_of_peak", took["products"] / took["network"], "share", repeats, None, where)
    done = 1e-9 * flops(network) * rows
    yield Row("network_gflops", done / took["network"], "GFLOP/s", repeats, None, where)
    yield Row("products_gflops", done / took["products"], "GFLOP/s", repeats, None, where)


def _wall() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure(quick: bool, console: Console) -> list[Row]:
    """Time the shipped network against the rows of a call and against its own arithmetic.

    :param quick: fewer repeats.
    :param console: where the tables go.
    """
    repeats = 5 if quick else 15
    network = shipped()
    rows = list(rows_rows(network, ROWS, repeats))
    _print(rows, console)
    parts = list(part_rows(network, 64, 4 * repeats))
    parts += part_rows(network, 180, 2 * repeats)
    _print_parts(parts, console)
    if torch.cuda.is_available():
        there = shipped().to("cuda")
        rows += (found := list(rows_rows(there, (*ROWS, 4096, 16384), repeats)))
        _print(found, console)
    return rows + parts


def _print(rows: list[Row], console: Console) -> None:
    *times, choice = rows
    where = choice.coordinates
    made = table(
        f"{PRIOR} on {where['device']}, {where['threads']} thread(s)",
        ["rows per call", "ms per row", "over the best", ""],
        f"sent at once: {where['rows']:,} rows, {choice.value:.2f} of the best {verdict(choice)}",
    )
    best = min(row.value for row in times)
    for row in times:
        mark = "chosen" if row.coordinates["chosen"] else ""
        count = f"{row.coordinates['rows']:,}"
        made.add_row(count, f"{row.value:.3f}", f"{row.value / best:.2f}", mark)
    console.print(made)


def _print_parts(rows: list[Row], console: Console) -> None:
    made = table(
        "The network against its parts",
        ["", "rows", "value", "unit", "goal"],
        "share of peak: time of the matrix products alone over that of the whole network",
    )
    for row in rows:
        count = str(row.coordinates["rows"])
        made.add_row(row.name, count, f"{row.value:.3f}", row.unit, verdict(row))
    console.print(made)


if __name__ == "__main__":
    run(measure)
