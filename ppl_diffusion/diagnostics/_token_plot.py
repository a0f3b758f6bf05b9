"""Plot of what the tokens of a posterior are not yet sure of."""

from math import log2
from typing import TYPE_CHECKING

import numpy as np

from ppl_diffusion.diagnostics._drawing import (
    BLACK,
    BLUE,
    DEAD,
    GREY,
    PALE,
    legend_beside,
    new_axes,
    say,
    warn_above,
)
from ppl_diffusion.diagnostics._plot_data import plot_token_entropy_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppl_diffusion.smc import Draws


def plot_token_entropy(
    posterior: "Draws", *, num_tokens: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Entropy of the tokens at each position, in bits, under the weights of all runs.

    With a stored path: a map of position against reverse step, from noise (top) to data (bottom),
    grey where every lineage is masked. It shows where and when the particles commit themselves; a
    position that is certain long before the end was fixed by few ancestors. The scale ends at the
    logarithm of the alphabet without the mask.

    :param num_tokens: size of that alphabet; found in the tokens if None.
    """
    ax = new_axes(ax, (7.5, 3.8))
    warn_above(ax, posterior)
    if not bool(posterior.alive.any()):
        say(ax, DEAD)
        return ax
    data = plot_token_entropy_data(posterior, num_tokens=num_tokens)
    size = int(data["num_tokens"])
    highest = log2(size) if size > 1 else 1.0
    if "entropy_steps" in data:
        drawn = np.ma.masked_array(data["entropy_steps"], data["revealed"] <= 0)
        ax.set_facecolor(PALE)
        image = ax.imshow(drawn, aspect="auto", cmap="cividis", vmin=0.0, vmax=highest)
        ax.figure.colorbar(image, ax=ax, label=f"entropy (bits), up to log2 {size}")
        ax.set(ylabel="reverse step")
    else:
        ax.step(data["position"], data["entropy"], where="mid", color=BLUE)
        ax.axhline(highest, color=GREY, ls=":", lw=1, label=f"log2 {size}")
        ax.set(ylabel="entropy of x0 (bits)", ylim=(0, 1.08 * highest))
        legend_beside(ax)
    plates = posterior.x0.shape[2:-1]
    ax.set(xlabel="position, plates side by side" if plates else "position")
    length = posterior.x0.shape[-1]
    for edge in range(length, len(data["position"]), length):
        ax.axvline(edge - 0.5, color=BLACK, lw=0.8)
    return ax
