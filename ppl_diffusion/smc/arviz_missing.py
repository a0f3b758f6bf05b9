"""Values that ``obs_mask`` leaves to be drawn, in ArviZ data: latents where nobody saw anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ppl_diffusion.smc.run_statistics import as_array

_END = "_unobserved"


@dataclass(frozen=True)
class Missing:
    """Which elements of a site were not observed.

    :param whole: the site of Pyro that puts data and draws together.
    :param batch: shape of the elements.
    :param index: which of them nobody saw, flat.
    """

    whole: str
    batch: tuple[int, ...]
    index: NDArray[np.int64]

    def only(self, values: NDArray[Any], lead: int) -> NDArray[Any]:
        """Return the values of these elements, side by side.

        :param lead: dimensions before the elements.
        """
        flat = values.reshape(*values.shape[:lead], -1, *values.shape[lead + len(self.batch) :])
        return np.take(flat, self.index, axis=lead)


def missing_elements(
    samples: Mapping[str, Tensor], plates: Mapping[str, tuple[str, ...]]
) -> dict[str, Missing]:
    """Find the sites that ``obs_mask`` made, by what they hold: files keep no masks.

    :param samples: values of all sites, each ``(R, N, ...)``.
    :param plates: the plates of each site.
    """
    found = {}
    for name in (name for name in samples if name.endswith(_END)):
        whole = name.removesuffix(_END)
        if whole in samples and samples[whole].shape == samples[name].shape:
            drawn, both = as_array(samples[name]), as_array(samples[whole])
            rank = len(plates.get(name, ())) or drawn.ndim - 2
            missing = _elements(drawn, both, rank)
            if rank and missing is not None:
                found[name] = Missing(whole, missing.shape, np.flatnonzero(missing))
    return found


def _elements(drawn: NDArray[Any], both: NDArray[Any], rank: int) -> NDArray[np.bool_] | None:
    """Mark the elements that are drawn; None if the others are no data, alike in all draws."""
    inner = (0, 1, *range(2 + rank, drawn.ndim))
    missing: NDArray[np.bool_] = (drawn == both).all(inner)
    constant = (both == both[:1, :1]).all(inner)
    return missing if bool((missing | constant).all()) else None
