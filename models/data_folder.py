"""The external data folder."""

from __future__ import annotations

import os
from pathlib import Path


def find_data(folder: str | Path | None, file: str) -> Path:
    """Return the path of a file of the data folder, by default ``PPL_DIFFUSION_DATA``.

    :raises FileNotFoundError: if no folder was given, or it lacks the file.
    """
    folder = folder or os.environ.get("PPL_DIFFUSION_DATA")
    if folder is None:
        raise FileNotFoundError(
            "No data folder was given: pass --data, or set PPL_DIFFUSION_DATA, to the folder that "
            f"holds {file}."
        )
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"The data folder {str(folder)!r} does not hold {file}: check --data."
        )
    return path
