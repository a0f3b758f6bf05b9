"""Briefs: one TOML file says prior, rewards, constraints, method and budget of a design.

::

    [prior]
    name = "yeast-promoter"       # a shipped prior, or a folder, seen from the brief's own

    [[reward]]                    # fields of RewardSpec, and one of its sources
    python = "my_scores:gc_pull"
    temperature = 0.2

    [[judge]]
    oracle = "yeast-oracle-judge"

    [constraints]
    gc = [0.3, 0.5]
    fix = ["40:TATAAA"]

    [search]
    method = "soft-value"
    particles = 72

What is left out is as usual; a key that nobody knows is refused. A run folder holds the brief that
was followed, every default filled in, and following it again gives the same bytes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from ppl_diffusion.designs.question import Job, Question, parse_fix, split_name
from ppl_diffusion.designs.reward_spec import RewardSpec, read_reward
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.jobs.options import options
from ppl_diffusion.jobs.search import Search

SUFFIX = ".toml"
_SHIPPED = files("ppl_diffusion.designs") / "briefs"
_TABLES = {
    "prior": ("name", "digest", "lengths", "label", "guidance"),
    "constraints": ("gc", "forbid", "fix"),
}
_NUMBERS = {"particles": "num_particles", "runs": "num_runs", "steps": "num_steps"}
_WORDS = ("method", "resampler", "seed", "ess_threshold", "device", "backend", "spread")
_LISTS = ("reward", "judge")


def job_of(name: str) -> Job:
    """Return the job of a prior by name: that of its shipped brief, or of the prior alone.

    :param name: a shipped prior, the folder of one, or the file of a brief.
    :raises InputError: if a brief cannot be read.
    """
    if name.endswith(SUFFIX):
        return read_brief(Path(name))
    shipped = _SHIPPED / f"{name}{SUFFIX}"
    if shipped.is_file() and not Path(name).is_dir():
        return _job(tomllib.loads(shipped.read_text(encoding="utf-8")), f"brief {name}", Path())
    return Job(_place(name, Path()))


def read_brief(path: Path) -> Job:
    """Read the file of a brief.

    :raises InputError: if it is not there, is no TOML, or says something that nobody knows.
    """
    where = f"brief {str(path)!r}"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no brief {str(path)!r}: check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"The {where} is no TOML ({error}): mend it.") from error
    return _job(entries, where, path.parent)


def _job(entries: Mapping[str, Any], where: str, folder: Path) -> Job:
    known = (*_TABLES, *_LISTS, "search")
    for key in entries:
        if key not in known:
            raise InputError(f"The {where} has no table {key!r}: it has {', '.join(known)}.")
    tables = {name: _table(entries, name, where) for name in (*_TABLES, "search")}
    for name, keys in _TABLES.items():
        for key in tables[name]:
            if key not in keys:
                raise InputError(
                    f"The table {name} of the {where} has no key {key!r}: it has {', '.join(keys)}."
                )
    prior, asked = tables["prior"], tables["constraints"]
    if not isinstance(prior.get("name"), str) or not prior["name"]:
        raise InputError(f"The {where} names no prior: give it, [prior] name = ...")
    question = Question(
        rewards=_rewards(entries, "reward", where, folder),
        judges=_rewards(entries, "judge", where, folder),
        gc=_pair(asked.get("gc"), f"gc of the {where}"),
        forbid=tuple(_texts(asked.get("forbid"), f"forbid of the {where}")),
        fix=tuple(map(parse_fix, _texts(asked.get("fix"), f"fix of the {where}"))),
        lengths=_lengths(prior.get("lengths"), f"lengths of the {where}"),
        label=None if "label" not in prior else str(prior["label"]),
        guidance=_number(prior.get("guidance", 1.0), f"guidance of the {where}"),
    )
    digest = prior.get("digest")
    return Job(_place(prior["name"], folder), question, _search(tables["search"], where), digest)


def _table(entries: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    table = entries.get(name, {})
    if not isinstance(table, Mapping):
        raise InputError(f"{name} of the {where} is {table!r}: write it as a table, [{name}].")
    return table


def _rewards(
    entries: Mapping[str, Any], kind: str, where: str, folder: Path
) -> tuple[RewardSpec, ...]:
    tables = entries.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(t, Mapping) for t in tables):
        raise InputError(f"{kind} of the {where} is no list of tables: write each as [[{kind}]].")
    judge, found = kind == "judge", []
    for number, table in enumerate(tables, 1):
        spec = read_reward(table, f"{kind.capitalize()} {number} of the {where}", judge=judge)
        found.append(_placed(spec, folder))
    return tuple(found)


def brief_reward(table: Mapping[str, Any], where: str, *, judge: bool = False) -> RewardSpec:
    """Read a table of a brief in which an object may stand in place of its name.

    :param where: how errors call it.
    """
    found = {key: table[key] for key in ("python", "torch") if callable(table.get(key))}
    names = {key: _called(value) for key, value in found.items()}
    spec = read_reward({**table, **names}, where, judge=judge)
    (made,) = found.values() or (None,)
    return _placed(replace(spec, object=made), Path())


def _called(found: Any) -> str:
    name = str(getattr(found, "__name__", type(found).__name__))
    return "reward" if name == "<lambda>" else name


def _placed(spec: RewardSpec, folder: Path) -> RewardSpec:
    """Return a reward whose files are seen from anywhere."""
    if spec.source == "motif":
        path, name = split_name(str(folder / spec.at))
        at = str(path.resolve())
        return replace(spec, at=at if name is None else f"{at}@{name}")
    kept = dict(spec.options)
    if isinstance(kept.get("cache"), str):
        kept["cache"] = str((folder / kept["cache"]).resolve())
    at = _place(spec.at, folder) if spec.source == "oracle" else spec.at
    return replace(spec, at=at, options=kept)


def _place(name: str, folder: Path) -> str:
    """Return a folder as seen from anywhere, and what is no folder as it is."""
    return str((folder / name).resolve()) if (folder / name).is_dir() else name


def _search(table: Mapping[str, Any], where: str) -> Search:
    known = (*_NUMBERS, *_WORDS, *options())
    for key in table:
        if key not in known:
            raise InputError(
                f"The table search of the {where} has no key {key!r}: it has {', '.join(known)}."
            )
    own = {_NUMBERS.get(key, key): table[key] for key in table if key in (*_NUMBERS, *_WORDS)}
    rest = {key: table[key] for key in table if key not in (*_NUMBERS, *_WORDS)}
    for key in ("num_particles", "num_runs", "num_steps", "seed"):
        if key in own and (not isinstance(own[key], int) or isinstance(own[key], bool)):
            raise InputError(f"{key} of the {where} is {own[key]!r}: give a whole number.")
    return Search(**own, options=rest)


def _texts(value: Any, what: str) -> list[str]:
    texts = [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} is {value!r}: give a list of texts.")
    return texts


def _pair(value: Any, what: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{what} is {value!r}: give two numbers.")
    try:
        low, high = map(float, value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is {value!r}: give two numbers.") from error
    return low, high


def _number(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{what} is {value!r}: give a number.")
    return float(value)


def _lengths(value: Any, what: str) -> tuple[int, int] | None:
    pair = _pair(value, what)
    return None if pair is None else (int(pair[0]), int(pair[1]))


def brief_text(job: Job) -> str:
    """Return a job as the text of a brief that says all of it."""
    question = job.question.settings()
    prior: dict[str, Any] = {"name": job.name}
    if job.prior_digest is not None:
        prior["digest"] = job.prior_digest
    for name in ("lengths", "label", "guidance"):
        if name in question:
            prior[name] = question[name]
    asked = {key: question[key] for key in ("gc", "forbid", "fix") if question[key]}
    entries = {
        "prior": prior,
        "reward": question["rewards"],
        "judge": question["judges"],
        "constraints": asked,
        "search": _search_entries(job.search),
    }
    return tomli_w.dumps({key: value for key, value in entries.items() if value})


def _search_entries(search: Search) -> dict[str, Any]:
    names = {value: key for key, value in _NUMBERS.items()}
    known = {*_NUMBERS.values(), *_WORDS, *options()}
    kept = {key: value for key, value in search.settings().items() if key in known}
    return {names.get(key, key): value for key, value in kept.items()}
