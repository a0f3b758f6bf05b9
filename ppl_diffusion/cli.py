"""The command ``ppl-diffusion``; a command imports what it needs when it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ppl_diffusion import __version__
from ppl_diffusion.commands.complain import exit_code
from ppl_diffusion.commands.flags import MODULE, MethodCommand, RestoreCommand, import_modules
from ppl_diffusion.commands.terminal import no_windows, readable_streams, spoken_warnings

app = typer.Typer(
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, Argument(help="Shipped prior, or folder that holds one.")]
Steps = Annotated[int, Option(help="Steps of the reverse chain.")]
Seed = Annotated[int, Option(help="Seed; the same seed gives the same files.")]
Device = Annotated[str, Option(help="Where to compute: cpu, cuda, cuda:1, mps, ...")]
Backend = Annotated[
    str, Option(help="Who computes: torch, or numpyro, where a run is compiled before it starts.")
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print errors only.")]
Particles = Annotated[int, Option(help="Particles per run.")]
Runs = Annotated[int, Option(help="Independent runs.")]
Resume = Annotated[
    bool, Option("--resume", help="Go on with a run that was interrupted, from its checkpoint.")
]
Every = Annotated[
    float, Option("--checkpoint-every", help="Seconds between two checkpoints, at least.")
]
Json = Annotated[
    bool, Option("--json", help="Print one JSON object on standard output, and nothing else.")
]
Force = Annotated[bool, Option("--force", help="Replace an earlier run.")]
MethodModule = Annotated[
    list[str] | None,
    Option(
        MODULE,
        metavar="MODULE",
        help="Import a module first, which registers a method; its name and fields are then "
        "among the options below. Repeatable.",
    ),
]


def main() -> None:
    raise SystemExit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param arguments: words after the program's name; those of the process by default.
    :returns: exit code: 0, 2 for bad input (with one sentence on standard error), 1 when a run
        could not give an answer.
    """
    words = None if arguments is None else list(arguments)
    with readable_streams(), spoken_warnings(), no_windows():
        return exit_code(lambda: app(args=words, prog_name="ppl-diffusion", standalone_mode=False))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    import_: Annotated[
        list[str] | None,
        Option(
            "--import",
            metavar="MODULE",
            help="Import a module first, which defines priors or methods. Repeatable.",
        ),
    ] = None,
) -> None:
    """Discrete diffusion models as distributions of a probabilistic program."""
    if version:
        typer.echo(f"ppl-diffusion {__version__}")
        raise typer.Exit
    import_modules(import_ or ())
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def models(json: Json = False) -> None:
    """List the shipped priors and oracles."""
    from ppl_diffusion.commands.listing import list_models

    list_models(as_json=json)


@app.command()
def sample(
    name: Name,
    num: Annotated[int, Option(help="How many sequences.")] = 10,
    sampler: Annotated[
        str,
        Option(
            help="ancestral, psi, confidence, first-hitting, parallel or semi-autoregressive; "
            "the last four need a masked prior."
        ),
    ] = "ancestral",
    steps: Annotated[
        int | None,
        Option(
            help="Steps of the chain, 64 by default; at most so many for parallel, and for "
            "semi-autoregressive, which reveals one position per step by default; first-hitting "
            "takes one step per position."
        ),
    ] = None,
    kappa_schedule: Annotated[
        str | None,
        Option(
            metavar="NAME[:NUMBERS]",
            help="For psi and confidence: remdm-cap:0.02, remdm-rescale:0.05, remdm-loop:0.01, "
            "constant:0.95,t_on=0.5, forward-backward, dfm, predictor-corrector, ...",
        ),
    ] = None,
    block: Annotated[int | None, Option(help="Positions per block of semi-autoregressive.")] = None,
    path: Annotated[
        str | None,
        Option(
            help="How a prior with a latent draws it and the tokens: seq (the latent first, the "
            "default), ordered, joint or masked."
        ),
    ] = None,
    latent_steps: Annotated[int | None, Option(help="Steps of the latent on the path seq.")] = None,
    token_steps: Annotated[int | None, Option(help="Steps of the tokens on the path seq.")] = None,
    filter_: Annotated[
        list[str] | None,
        Option(
            "--filter",
            metavar="NAME:NUMBER",
            help="nucleus:P, nucleus-drop:P or temperature:T. Repeatable, the first acts first.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    backend: Backend = "torch",
    out: Annotated[
        Path | None,
        Option(help="File ending in .fasta, .fa, .csv, .tsv, .txt or .smi; printed if absent."),
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace a file that is there.")] = False,
    json: Json = False,
) -> None:
    """Draw sequences from a prior, with a sampler of your choice."""
    from ppl_diffusion.commands.actions import draw_samples
    from ppl_diffusion.models.samplers import SamplerSettings

    filters = tuple(filter_ or ())
    settings = SamplerSettings(
        steps, kappa_schedule, block, filters, path, latent_steps, token_steps
    )
    draw_samples(
        name,
        num=num,
        seed=seed,
        sampler=sampler,
        settings=settings,
        out=out,
        device=device,
        backend=backend,
        replace=force,
        as_json=json,
    )


@app.command(cls=MethodCommand)
def design(
    context: typer.Context,
    name: Name,
    particles: Particles = 72,
    runs: Runs = 4,
    steps: Annotated[
        int | None,
        Option(
            help="Steps of the reverse chain; if nothing is said one per four positions of a "
            "masked prior, and 64 of any other."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    backend: Backend = "torch",
    out: Annotated[Path | None, Option(help="Run folder; runs/NAME if absent.")] = None,
    force: Force = False,
    resume: Resume = False,
    checkpoint_every: Every = 10.0,
    observe: Annotated[
        float | None, Option(help="Observed expression: Normal(oracle(x), SD).")
    ] = None,
    sd: Annotated[
        float | None, Option(help="Standard deviation of --observe, 0.5 by default.")
    ] = None,
    temperature: Annotated[
        float | None,
        Option(
            "--temperature",
            "--reward-temperature",
            help="Reward oracle(x) / TEMPERATURE; what a prior with an oracle does by default.",
        ),
    ] = None,
    no_expression: Annotated[
        bool, Option("--no-expression", help="Ask for no expression at all.")
    ] = False,
    motif: Annotated[
        list[str] | None,
        Option(
            metavar="FILE[@NAME][:WEIGHT]",
            help="Reward the best hit of a matrix: MEME, JASPAR, TRANSFAC, XMS, or a table with a "
            "line per base or per position. Repeatable.",
        ),
    ] = None,
    gc: Annotated[
        tuple[float, float] | None, Option(help="Lowest and highest GC content, as shares.")
    ] = None,
    forbid: Annotated[
        list[str] | None,
        Option(metavar="IUPAC", help="Motif that occurs on neither strand. Repeatable."),
    ] = None,
    fix: Annotated[
        list[str] | None,
        Option(metavar="POS:BASES", help="Fixed bases, counted from 0. Repeatable."),
    ] = None,
    ess_threshold: Annotated[
        float | None,
        Option(
            help="Resample below this share of effective particles; 0.2 for refinement, the "
            "method's own for others."
        ),
    ] = None,
    method_module: MethodModule = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Design sequences: the posterior of a prior under a reward, an observation and constraints."""
    from ppl_diffusion.commands.actions import run_design
    from ppl_diffusion.design.question import Job, Question, parse_fix, parse_forbid, parse_motif
    from ppl_diffusion.jobs.search import Search

    question = Question(
        observe=observe,
        sd=sd,
        temperature=temperature,
        expression=not no_expression,
        motifs=tuple(map(parse_motif, motif or ())),
        gc=gc,
        forbid=tuple(map(parse_forbid, forbid or ())),
        fix=tuple(map(parse_fix, fix or ())),
    )
    search = Search.asked(
        {"method": Search.method, **context.obj},
        num_particles=particles,
        num_runs=runs,
        num_steps=steps,
        seed=seed,
        ess_threshold=ess_threshold,
        device=device,
        backend=backend,
    )
    place = out or Path("runs") / Path(name).name
    run_design(
        Job(name, question, search),
        place,
        replace=force,
        quiet=quiet,
        resume=resume,
        every=checkpoint_every,
        as_json=json,
    )


@app.command(cls=RestoreCommand)
def restore(
    context: typer.Context,
    image: Annotated[
        str,
        Argument(
            help="PNG, JPEG, .npy or .npz file; or a test image of a set by its number, counted "
            "from 0: digits:N, or mnist:N and faces:N of --data."
        ),
    ],
    operator: Annotated[
        str | None,
        Option(
            help="How it is measured: sr4 (by default), sr2, gblur, mblur, nlblur, rinp, box, hdr, "
            "phase, or one that an imported module registers."
        ),
    ] = None,
    noise: Annotated[
        float | None,
        Option(help="Standard deviation of the noise, for pixels from -1 to 1; 0.05 by default."),
    ] = None,
    measured: Annotated[
        bool, Option("--measured", help="IMAGE is a measurement.npz: nobody knows the truth.")
    ] = False,
    resize: Annotated[
        bool, Option("--resize", help="Bring an image of another size to that of the prior.")
    ] = False,
    data: Annotated[
        Path | None,
        Option(envvar="PPL_DIFFUSION_DATA", help="Folder that holds images/, for mnist and faces."),
    ] = None,
    prior: Annotated[str, Option(help="Shipped prior, or folder that holds one.")] = "digits",
    codec: Annotated[
        str | None, Option(help="Its codec, or a folder that holds one; found by itself.")
    ] = None,
    codec_error: Annotated[
        bool | None,
        Option(
            help="Count what the codec leaves out of images as a part of the model, so that draws "
            "are not too sure; if nothing is said, where the codec knows it."
        ),
    ] = None,
    particles: Particles = 32,
    runs: Runs = 2,
    steps: Annotated[
        int | None,
        Option(
            help="Steps of the reverse chain; if nothing is said one per two tokens of a masked "
            "prior, and 64 of any other."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Annotated[Path | None, Option(help="Run folder; runs/restore if absent.")] = None,
    force: Force = False,
    ess_threshold: Annotated[
        float | None,
        Option(help="Resample below this share of effective particles; the method's own."),
    ] = None,
    method_module: MethodModule = None,
    quiet: Quiet = False,
) -> None:
    """Restore an image from what was measured of it: draws, mean, and how sure each pixel is."""
    from ppl_diffusion.commands.restoring import run_restore
    from ppl_diffusion.jobs.search import Search
    from ppl_diffusion.restoration.question import Job, Question

    search = Search.asked(
        {"method": RestoreCommand.usual, **context.obj},
        num_particles=particles,
        num_runs=runs,
        num_steps=steps,
        seed=seed,
        ess_threshold=ess_threshold,
        device=device,
    )
    question = Question(image, operator, noise, measured, resize, codec_error)
    place = out or Path("runs") / "restore"
    run_restore(Job(prior, question, search, codec, data), place, replace=force, quiet=quiet)


@app.command()
def train(
    name: Annotated[str, Argument(help="Recipe, by the name of its prior.")],
    data: Annotated[
        Path | None,
        Option(envvar="PPL_DIFFUSION_DATA", help="Folder that holds dna/, molecules/, ..."),
    ] = None,
    out: Annotated[Path | None, Option(help="Folder of the run; runs/train-NAME.")] = None,
    steps: Annotated[
        int | None, Option(help="Optimiser steps; those of the recipe if absent.")
    ] = None,
    objective: Annotated[
        str | None, Option(help="nelbo, curriculum or distillation; that of the recipe if absent.")
    ] = None,
    init: Annotated[
        str | None, Option(help="Prior to start from; distillation starts from the shipped NAME.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a prior, or a codec or classifier of images, by its recipe."""
    from ppl_diffusion.commands.actions import train_prior

    place = out or Path("runs") / f"train-{name}"
    train_prior(
        name,
        data=data,
        out=place,
        steps=steps,
        objective=objective,
        init=init,
        seed=seed,
        device=device,
        resume=resume,
        force=force,
        quiet=quiet or json,
        as_json=json,
    )


@app.command()
def diagnose(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder written by design.")],
    plots: Annotated[Path | None, Option(help="Also draw the plots into this folder.")] = None,
    json: Json = False,
) -> None:
    """Print how far the particles of a run can be trusted."""
    from ppl_diffusion.commands.actions import diagnose_run

    diagnose_run(folder, plots=plots, as_json=json)


@app.command()
def compare(
    folders: Annotated[
        list[Path], Argument(metavar="RUN RUN ...", help="Folders written by design.")
    ],
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="Also draw them: .png, .pdf or .svg.")
    ] = None,
    json: Annotated[
        Path | None,
        Option(metavar="FILE", help="Also write the figures as JSON; - prints them."),
    ] = None,
) -> None:
    """Set runs side by side, as they are and at equal network evaluations.

    Runs of different cost are brought to the budget of the cheapest by keeping whole independent
    runs, never part of the particles of one. Evidences are comparable under one target letter.
    """
    from ppl_diffusion.commands.actions import compare_runs

    compare_runs(folders, plot=plot, out=json)


if __name__ == "__main__":
    main()
