"""What tells sequences apart: their tokens, or what a user says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppl_diffusion.errors import PotentialError


def keys_of(
    rows: Tensor, key: Callable[[Tensor], Sequence[bytes | str]] | None, name: str
) -> list[bytes]:
    """Return the key of each row.

    :param rows: int64 ``(B, L)``.
    :param key: gives a text or bytes for each, None for the tokens.
    :param name: of the function, which errors name.
    :raises PotentialError: if ``key`` fails, or does not return one text or bytes per row.
    """
    if key is None:
        return [row.tobytes() for row in rows.to(torch.int32).numpy()]
    try:
        found = list(key(rows))
    except Exception as error:
        raise PotentialError(
            f"{name}: the key raised {type(error).__name__} ({error}) when asked about "
            f"{len(rows)} sequences; return a text or bytes for each."
        ) from error
    odd = next((type(one).__name__ for one in found if not isinstance(one, bytes | str)), None)
    if odd is not None or len(found) != len(rows):
        what = f"{len(found)} values" if odd is None else f"an object of type {odd}"
        raise PotentialError(
            f"{name}: the key returned {what} for {len(rows)} sequences; return a text or bytes "
            "for each."
        )
    return [one.encode() if isinstance(one, str) else one for one in found]
