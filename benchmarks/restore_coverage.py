"""Why intervals of the exact sampler hold too few pixels: particles, or the model.

Where the model drew the truth itself (tokens by the chain, the codec's error on top), nine pixels
in ten lie in 90 % intervals of its posterior, and what is missing is owed to the number of
particles. Test images are measured in the same way; what they miss beyond that, the model owes: the
prior, and a codec error that is Gaussian and knows nothing of the tokens. Pixels are not clipped
here, as the law of the model does not clip them; "clipped" is the share that ``benchmarks.restore``
prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

from benchmarks._report import JsonFile, Quick, Row, console, table, write
from benchmarks._restore_methods import ByMethod, Problem, restorers
from benchmarks._restore_scores import paired
from benchmarks.restore import EXACT
from ppl_diffusion import models
from ppl_diffusion.imaging import weighted
from ppl_diffusion.imaging.measurement import measure
from ppl_diffusion.imaging.operators import make_operator
from ppl_diffusion.models.image_data import load_images

PARTICLES, NUM_IMAGES = (8, 32, 128), 64
TRUTHS = ("the model", "test images")


@cache
def _parts() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "prior": models.load("digits"),
        "codec": models.load_codec("digits-codec"),
        "error": models.load_codec_error("digits-codec"),
        "test": load_images("digits").test,
    }


def restorer(num_particles: int) -> ByMethod:
    """Return the exact sampler of the benchmark of restoration."""
    every = restorers(num_particles=num_particles, error=_parts()["error"])
    found = every[EXACT]
    assert isinstance(found, ByMethod)
    return found


def draw_truth(image: int) -> Tensor:
    """Return an image of the model that is restored by, ``(C, H, W)``.

    :param image: the seed.
    """
    parts = _parts()
    chain = restorer(1).chain(parts["prior"])
    error = parts["error"]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(image)
        decoded = parts["codec"].decode(chain.x0(chain.sample()))
        lacking = LowRankMultivariateNormal(error.mean, error.factor, error.variance).sample()
    return decoded + lacking.reshape(decoded.shape)


def cover(task: str, noise: float, case: tuple[int, str]) -> dict[int, tuple[float, ...]]:
    """Return shares of pixels, as they are and clipped, and different sequences, by particles.

    :param case: the image, and where truths come from.
    """
    (image, origin), parts = case, _parts()
    test = parts["test"]
    truth = test[image * (len(test) // NUM_IMAGES)] if origin == TRUTHS[1] else draw_truth(image)
    operator = make_operator(task, tuple(truth.shape), seed=image)
    measurement = measure(operator, truth, noise, seed=image)
    problem = Problem(parts["prior"], None, parts["codec"], measurement, truth)
    found = {}
    for num_particles in PARTICLES:
        restored = restorer(num_particles)(problem, image)
        weights = restored.weights.double()
        assert restored.tokens is not None
        shares = [
            weighted.coverage(each(truth), each(restored.images), weights)
            for each in (torch.Tensor.clone, lambda x: x.clamp(-1.0, 1.0))
        ]
        found[num_particles] = (*shares, float(len(restored.tokens.unique(dim=0))))
    return found


def rows_of(
    found: Mapping[str, list[dict[int, tuple[float, ...]]]], task: str, noise: float
) -> Iterator[Row]:
    """Return the mean share of pixels by origin of the truth and number of particles."""
    for origin, images in found.items():
        for num_particles in PARTICLES:
            each, clipped, sequences = zip(*(image[num_particles] for image in images), strict=True)
            share, error = paired(each, [0.0] * len(each))
            own = {
                "truth": origin,
                "particles": num_particles,
                "se": error,
                "clipped": sum(clipped) / len(clipped),
                "sequences": sum(sequences) / len(sequences),
                "task": task,
                "noise": noise,
            }
            yield Row("restore_coverage", share, "share", len(each), coordinates=own)


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    task: Annotated[str, typer.Option(help="The operator.")] = "sr4",
    noise: Annotated[float, typer.Option(help="Its noise.")] = 0.05,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
) -> None:
    """Tell what too few particles cost intervals from what a wrong model costs them."""
    cases = list(product(range(8 if quick else NUM_IMAGES), TRUTHS))
    found: dict[str, list[dict[int, tuple[float, ...]]]] = {origin: [] for origin in TRUTHS}
    described = {"description": "images", "transient": True, "console": Console(stderr=True)}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = pool.map(partial(cover, task, noise), cases)
        for (_, origin), each in zip(
            cases, track(shares, total=len(cases), **described), strict=True
        ):
            found[origin].append(each)
    rows = list(rows_of(found, task, noise))
    made = table(
        f"{task}, noise {noise:g}: share of pixels in 90 % intervals, {rows[0].n} images",
        ["truth drawn by", "particles", "share", "clipped", "sequences in 256 draws"],
    )
    for row in rows:
        c = row.coordinates
        share = f"{row.value:.3f} ± {c['se']:.3f}"
        made.add_row(
            c["truth"], str(c["particles"]), share, f"{c['clipped']:.3f}", f"{c['sequences']:.1f}"
        )
    console().print(made)
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
