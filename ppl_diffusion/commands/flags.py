"""Flags of ``design`` and ``restore`` that come from the registered methods."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import import_module
from inspect import Parameter, Signature
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from ppl_diffusion.jobs.checks import user_input

MODULE = "--method-module"
PANEL = "How to look (in brackets: what a method does if nothing is said)"
SHARED = "Options of several methods"
_FIELD = "option_"
"""Goes before the names of fields, which may be those of the command's own parameters."""


class MethodCommand(TyperCommand):
    """A command that learns its flags from the registry when it is called.

    Not before: the registry is as heavy as torch, and other commands need neither. The values end
    up in ``context.obj``, by the names of the fields.

    :cvar usual: the method, if nothing is said.
    :cvar left_out: options that are none of this command.
    """

    usual: ClassVar[str] = "refinement"
    left_out: ClassVar[Collection[str]] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Import the modules that define methods, read the registry, and parse."""
        import_modules(_modules(args))
        taken = {flag for param in self.params for flag in param.opts}
        self.params = [*self.params, *_click_options(_parameters(taken, self.usual, self.left_out))]
        left: list[str] = super().parse_args(ctx, args)
        return left

    def invoke(self, ctx: Any) -> Any:
        """Hand the values of the methods' flags over in one dictionary."""
        names = [name for name in ctx.params if name.startswith(_FIELD)]
        values = {name.removeprefix(_FIELD): ctx.params.pop(name) for name in names}
        ctx.obj = {name: value for name, value in values.items() if value is not None}
        return super().invoke(ctx)


class RestoreCommand(MethodCommand):
    """The same for restorations."""

    usual = "aps-smc"
    left_out = ("power",)


def import_modules(names: Sequence[str]) -> None:
    """Import a user's modules, those of the working folder last.

    :raises InputError: if one cannot be found.
    """
    if "" not in sys.path:
        sys.path.append("")
    with user_input():
        for name in names:
            import_module(name)


def _modules(args: Sequence[str]) -> list[str]:
    after = [value for flag, value in pairwise(args) if flag == MODULE]
    return after + [w.removeprefix(f"{MODULE}=") for w in args if w.startswith(f"{MODULE}=")]


def _click_options(parameters: Iterable[Parameter]) -> list[Any]:
    """Let typer make the options, as if they were written in a command's signature."""

    def carrier(**_: Any) -> None: ...

    carrier.__signature__ = Signature(list(parameters))  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(carrier)
    return list(typer.main.get_command(app).params)


def _parameters(
    taken: Collection[str], usual: str, left_out: Collection[str]
) -> Iterator[Parameter]:
    from ppl_diffusion.inference import methods
    from ppl_diffusion.jobs.options import options
    from ppl_diffusion.smc import RESAMPLERS

    known = (f"{name}: {(cls.__doc__ or '').split('.')[0]}." for name, cls in methods().items())
    yield _parameter("method", str, "--method", f"{usual} if nothing is said. {' '.join(known)}")
    schemes = f"Systematic if nothing is said; one of {', '.join(RESAMPLERS)}."
    yield _parameter("resampler", str, "--resampler", schemes)
    asked = (option for option in options().values() if option.name not in left_out)
    for option in sorted(asked, key=lambda option: len(option.owners) == 1):  # shared ones first
        flag = option.flag if option.flag not in taken else f"--method{option.flag[1:]}"
        flags = f"{flag}/{option.off}" if option.kind is bool else flag
        owner, *others = option.owners
        panel = SHARED if others else f"Options of {owner}"
        yield _parameter(option.name, option.kind, flags, option.help, panel)


def _parameter(name: str, kind: Any, flag: str, text: str, panel: str = PANEL) -> Parameter:
    said = typer.Option(flag, help=text, rich_help_panel=panel)
    return Parameter(
        _FIELD + name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, said]
    )
