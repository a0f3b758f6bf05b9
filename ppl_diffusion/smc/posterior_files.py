"""The file format of results: one for weighted particles and for draws of Markov chains.

Arrays are in ``particles.safetensors``, everything else in ``particles.json``, whose ``"kind"``
says which class of result it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppl_diffusion.arrays import json_types
from ppl_diffusion.smc.law import Law

ARRAYS_FILE = "particles.safetensors"
META_FILE = "particles.json"
FORMAT = 5
_SITE = "samples."
_NOT_SAVED = ("origin",)
Kinds = Mapping[str, type[Any]]


def write_posterior(posterior: Any, directory: Path, kind: str) -> Path:
    """Write a result.

    :param kind: what the file calls it.
    :raises NotADirectoryError: if a file is in the way.
    """
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"save: {place} is a file; give the name of a folder.")
    directory.mkdir(parents=True, exist_ok=True)
    arrays, meta = _split(posterior)
    save_file(arrays, directory / ARRAYS_FILE)
    text = json.dumps({"format": FORMAT, "kind": kind, **meta}, indent=1, sort_keys=True)
    (directory / META_FILE).write_text(text + "\n", encoding="utf-8")
    return directory


def read_posterior(directory: Path, kinds: Kinds, known: Kinds) -> tuple[Any, dict[str, Any]]:
    """Return the class of the result in a folder, and its fields.

    :param kinds: the classes asked for, by kind.
    :param known: all classes, by kind.
    :raises FileNotFoundError: if there is none.
    :raises ValueError: if a file is damaged, of another format, or of another kind.
    """
    arrays, meta = _read(directory)
    kind = meta.pop("kind", None)
    if kind not in known:
        raise _damaged(directory, f"{META_FILE} says kind {kind!r}")
    if kind not in kinds:
        names = " or ".join(cls.__name__ for cls in kinds.values())
        raise ValueError(
            f"{directory} holds a {known[kind].__name__}, not a {names}: read it by "
            f"{known[kind].__name__}.load, or by Draws.load, which takes every kind."
        )
    cls = kinds[kind]
    _check_names(directory, cls, arrays, meta)
    sites = {name: arrays.pop(f"{_SITE}{name}") for name in meta.pop("sites")}
    plates = {site: tuple(names) for site, names in meta.pop("plates").items()}
    law = _read_law(directory, meta.pop("law"))
    return cls, {**arrays, **meta, "samples": sites, "plates": plates, "law": law}


def _split(posterior: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arrays = {f"{_SITE}{name}": value for name, value in posterior.samples.items()}
    meta: dict[str, Any] = {"sites": list(posterior.samples)}
    for item in fields(posterior):
        value = getattr(posterior, item.name)
        if isinstance(value, Tensor):
            arrays[item.name] = value
        elif item.name == "law":
            meta["law"] = posterior.law.to_json()
        elif item.name not in ("samples", *_NOT_SAVED) and not _is_array(item):
            meta[item.name] = json_types(value)
    return {name: value.contiguous().clone() for name, value in arrays.items()}, meta


def _is_array(item: Field[Any]) -> bool:
    return str(item.type).startswith("Tensor")


def _is_optional(item: Field[Any]) -> bool:
    """Whether some results do without this array."""
    return _is_array(item) and "None" in str(item.type)


def _read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the contents of both files."""
    for name in (ARRAYS_FILE, META_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds no particle posterior: {name} is missing; "
                "give a folder that ParticlePosterior.save or a design run wrote."
            )
    try:
        meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
        with safe_open(directory / ARRAYS_FILE, framework="pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise _damaged(directory, str(error)) from error
    if not isinstance(meta, dict):
        raise _damaged(directory, f"{META_FILE} holds no JSON object")
    if meta.pop("format", None) != FORMAT:
        raise ValueError(f"{directory} was written in another format; this one is {FORMAT}.")
    return arrays, meta


def _check_names(
    directory: Path, cls: type[Any], arrays: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    items = fields(cls)
    numbers = {i.name for i in items if not _is_array(i)} - {"samples", *_NOT_SAVED}
    _compare(directory, META_FILE, set(meta), numbers | {"sites"})
    if not isinstance(meta["sites"], list):
        raise _damaged(directory, f"'sites' in {META_FILE} is no list")
    if not isinstance(meta["plates"], dict):
        raise _damaged(directory, f"'plates' in {META_FILE} is no JSON object")
    kept = {i.name for i in items if _is_array(i) and not _is_optional(i)}
    optional = {i.name for i in items if _is_optional(i)}
    sites = {f"{_SITE}{name}" for name in meta["sites"]}
    _compare(directory, ARRAYS_FILE, set(arrays) - optional, kept | sites)


def _read_law(directory: Path, data: Any) -> Law:
    try:
        return Law.from_json(data)
    except (TypeError, ValueError, KeyError) as error:
        raise _damaged(directory, f"'law' in {META_FILE} is no law ({error})") from error


def _compare(directory: Path, file: str, found: set[str], expected: set[str]) -> None:
    for what, names in (("lacks", expected - found), ("has unknown", found - expected)):
        if names:
            raise _damaged(directory, f"{file} {what} {', '.join(map(repr, sorted(names)))}")


def _damaged(directory: Path, reason: str) -> ValueError:
    return ValueError(
        f"{directory} holds a damaged particle posterior: {reason.rstrip('.')}; write it again "
        "with ParticlePosterior.save or a design run."
    )
