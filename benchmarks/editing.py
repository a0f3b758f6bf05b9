"""Block editing: a part of a digit drawn anew, with another digit asked for.

The tokens outside of a block are held as a prompt, those inside are drawn from a prior with labels
under classifier-free guidance, weight 0 without the label, 1 with it, more beyond. A classifier
that steers nothing says which digit came out. Outside of the block no token may change; its pixels
may, beside the edge, as the decoder sees across it: a likelihood of the outside pixels keeps them
closer, at the price of particles (``aps-smc``). The images are test digits bundled with
scikit-learn; standard errors are over images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._report import Row, run, table
from ppl_diffusion import models
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.imaging import Block, ImageClassifier, ImageCodec, block_prompt, outside_pixels
from ppl_diffusion.inference import SMC, QuantisedExpectation
from ppl_diffusion.kernels import ClassifierFreeKernel
from ppl_diffusion.models.image_data import load_images
from ppl_diffusion.models.program import DiffusionProgram

BLOCKS = {
    "lower half": Block(8, 0, 8, 16),
    "right half": Block(0, 8, 16, 8),
    "lower three quarters": Block(4, 0, 12, 16),
}
WEIGHTS = (0.0, 1.0, 2.0, 4.0)
STEPS, SIGMA, PARTICLES, SEED = 8, 0.3, 16, 0


@dataclass(frozen=True)
class Editor:
    """What edits, and who looks at it.

    :param prior: over tokens of the codec, with labels.
    :param classifier: says which digit an image is.
    """

    prior: DiffusionProgram
    codec: ImageCodec
    classifier: ImageClassifier

    def chain(self, prompt: Tensor, label: int, weight: float) -> ReverseChain:
        """Return the chain of a digit, with tokens held.

        :param prompt: int64 ``(L,)``, -1 where tokens are drawn.
        :param label: the digit that is asked for.
        :param weight: of the guidance.
        """
        prior = self.prior
        kernel = ClassifierFreeKernel(
            prior.process,
            prior.labelled(label),
            prior.labelled(None),
            weight=weight,
            num_steps=STEPS,
        )
        return prior.around(kernel, prompt=prompt)

    def edited(self, image: Tensor, block: Block, label: int, weight: float, keep: bool) -> Tensor:
        """Return the tokens of one edited image, int64 ``(L,)``.

        :param keep: whether the pixels outside have a likelihood.
        """
        chain = self.chain(block_prompt(self.codec, image, block), label, weight)
        if not keep:
            return chain.x0(chain.sample())
        measured = outside_pixels(self.codec, self.codec(image[None])[0], block, SIGMA)
        found = SMC(
            chain,
            measured,
            method="aps-smc",
            expectation=QuantisedExpectation(num_iterations=5),
            num_particles=PARTICLES,
            store_path=False,
        ).run(seed=SEED)
        pick = torch.multinomial(found.log_weights[0].exp(), 1)
        return found.x0[0, pick[0]]


def measure(quick: bool, console: Console) -> list[Row]:
    """Edit blocks of digits under classifier-free guidance."""
    codec, judge = models.load_codec("digits-codec"), models.load_classifier("digits-classifier")
    editor = Editor(models.load("digits"), codec, judge)
    images = load_images("digits")
    count = 10 if quick else 100
    rows: list[Row] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        shift = torch.randint(1, 10, (count,))
        labels = (images.labels[2][:count] + shift) % 10
        for name, block in BLOCKS.items():
            cases = [(weight, False) for weight in WEIGHTS] + [(WEIGHTS[2], True)]
            for weight, keep in cases:
                rows += _rows(editor, name, block, (images.test[:count], labels), weight, keep)
            console.print(_table(name, [r for r in rows if r.coordinates["block"] == name]))
    return rows


def _rows(
    editor: Editor,
    name: str,
    block: Block,
    asked: tuple[Tensor, Tensor],
    weight: float,
    keep: bool,
) -> list[Row]:
    images, labels = asked
    tokens = torch.stack(
        [
            editor.edited(image, block, int(label), weight, keep)
            for image, label in zip(images, labels, strict=True)
        ]
    )
    before, after = editor.codec(images), editor.codec.decode(tokens)
    outside = ~block.tokens(editor.codec)
    changed = (tokens != editor.codec.encode(images))[:, outside].sum(-1).double()
    apart = (after - before)[..., ~block.pixels(editor.codec)].abs().flatten(1)
    figures = {
        "asked_for": (editor.classifier(after).argmax(-1) == labels).double(),
        "outside_tokens_changed": changed,
        "outside_pixels_mean": apart.mean(-1),
        "outside_pixels_largest": apart.amax(-1),
    }
    where = {"block": name, "weight": weight, "method": "aps-smc" if keep else "prior"}
    return [
        Row(key, float(v.mean()), "", len(v), None, where | {"se": _error(v)})
        for key, v in figures.items()
    ]


def _error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def _table(name: str, rows: list[Row]) -> object:
    made = table(
        f"{name} drawn anew ({rows[0].n} digits)",
        ["guidance", "digit asked for", "tokens changed", "pixels, mean", "pixels, largest"],
        "tokens and pixels outside of the block; pixels in [-1, 1], against the decoded original",
    )
    for first in range(0, len(rows), 4):
        group = rows[first : first + 4]
        where = group[0].coordinates
        label = f"{where['weight']:g}" + (", pixels held" if where["method"] != "prior" else "")
        asked, changed, *pixels = (f"{r.value:.3f} ± {r.coordinates['se']:.3f}" for r in group)
        made.add_row(label, asked, changed if group[1].value else "0", *pixels)
    return made


if __name__ == "__main__":
    run(measure)
