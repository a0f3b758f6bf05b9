"""The command ``ppl-diffusion``; a command imports what it needs when it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
Label = Annotated[str | None, Option(help="Class, of a prior that was trained with classes.")]
Guidance = Annotated[
    float | None,
    Option(
        help="Weight of classifier-free guidance towards the class; 1 is the conditional prior."
    ),
]
Force = Annotated[bool, Option("--force", help="Replace an earlier run.")]
OWN = "For sequences of your own"
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
    label: Label = None,
    guidance: Guidance = None,
    lengths: Annotated[
        tuple[int, int] | None,
        Option(help="Fewest and most tokens, of a prior over several lengths."),
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
        label=label,
        guidance=guidance,
        lengths=lengths,
        replace=force,
        as_json=json,
    )


@app.command(cls=MethodCommand)
def design(
    context: typer.Context,
    name: Annotated[
        str,
        Argument(
            metavar="PRIOR_OR_BRIEF",
            help="Shipped prior, folder of one, or a brief, FILE.toml, which options override.",
        ),
    ],
    particles: Annotated[int | None, Option(help="Particles per run; 72 by default.")] = None,
    runs: Annotated[int | None, Option(help="Independent runs; 4 by default.")] = None,
    steps: Annotated[
        int | None,
        Option(
            help="Steps of the reverse chain; if nothing is said one per four positions of a "
            "masked prior, and 64 of any other."
        ),
    ] = None,
    seed: Annotated[
        int | None, Option(help="Seed, 0 by default; the same seed gives the same files.")
    ] = None,
    device: Annotated[
        str | None, Option(help="Where to compute: cpu (by default), cuda, cuda:1, mps, ...")
    ] = None,
    backend: Annotated[
        str | None,
        Option(help="Who computes: torch (by default), or numpyro, where a run is compiled first."),
    ] = None,
    out: Annotated[Path | None, Option(help="Run folder; runs/NAME if absent.")] = None,
    force: Force = False,
    resume: Resume = False,
    checkpoint_every: Every = 10.0,
    workers: Annotated[
        int | None,
        Option(
            help="Spread the runs over so many processes; each run has a seed of its own then, "
            "whatever their number."
        ),
    ] = None,
    executor: Annotated[
        str | None,
        Option(help="Where: processes of this machine (by default), or ray, of a cluster."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        Option(
            metavar="MODULE:FUNCTION[,KEY=VALUE...]",
            help="Reward by a function of a list of sequences that returns a number for each. Keys "
            "are those of a brief: temperature=0.2, goal=minimise, weight=2, workers=4, "
            "timeout=60, ... Repeatable.",
        ),
    ] = None,
    reward_torch: Annotated[
        list[str] | None,
        Option(
            metavar="MODULE:OBJECT[,KEY=VALUE...]",
            help="Reward by a torch network on one-hot sequences, (n, letters, L); head=K chooses "
            "one of its outputs. Repeatable.",
        ),
    ] = None,
    reward_command: Annotated[
        list[str] | None,
        Option(
            metavar="CMD",
            help="Reward by a program that reads a sequence per line and answers "
            '{"version": 1, "payload": {NAME: [NUMBERS]}}. Repeatable.',
        ),
    ] = None,
    observe: Annotated[
        float | None, Option(help="Observed score of the oracle of the brief: Normal(score, SD).")
    ] = None,
    sd: Annotated[
        float | None, Option(help="Standard deviation of --observe, 0.5 by default.")
    ] = None,
    temperature: Annotated[
        float | None,
        Option(
            "--temperature",
            "--reward-temperature",
            help="TEMPERATURE of every reward: exp(score / TEMPERATURE).",
        ),
    ] = None,
    no_expression: Annotated[
        bool,
        Option("--no-expression", "--no-reward", help="Drop the rewards of the brief."),
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
        Option(
            metavar="PIECE",
            help="What occurs nowhere: IUPAC of bases, of DNA on both strands. Repeatable.",
        ),
    ] = None,
    fix: Annotated[
        list[str] | None,
        Option(metavar="POS:BASES", help="Fixed tokens, counted from 0. Repeatable."),
    ] = None,
    lengths: Annotated[
        tuple[int, int] | None,
        Option(help="Fewest and most tokens, of a prior over several lengths."),
    ] = None,
    label: Label = None,
    guidance: Guidance = None,
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
    """Design sequences: the posterior of a prior under rewards, observations and constraints."""
    from ppl_diffusion.commands.designing import Options, run_design
    from ppl_diffusion.designs.flags import Asked, parse_command, parse_reward
    from ppl_diffusion.designs.question import parse_fix, parse_motif

    rewards = (
        *(parse_reward(text, "python") for text in reward or ()),
        *(parse_reward(text, "torch") for text in reward_torch or ()),
        *map(parse_command, reward_command or ()),
        *map(parse_motif, motif or ()),
    )
    asked = Asked(
        observe=observe,
        sd=sd,
        temperature=temperature,
        expression=not no_expression,
        rewards=rewards,
        gc=gc,
        forbid=tuple(forbid or ()),
        fix=tuple(map(parse_fix, fix or ())),
        lengths=lengths,
        label=label,
        guidance=guidance,
    )
    numbers = {
        "num_particles": particles,
        "num_runs": runs,
        "num_steps": steps,
        "seed": seed,
        "ess_threshold": ess_threshold,
        "device": device,
        "backend": backend,
    }
    options = Options(
        out,
        replace=force,
        resume=resume,
        every=checkpoint_every,
        quiet=quiet,
        workers=workers,
        executor=executor,
        as_json=json,
    )
    run_design(name, asked, {**context.obj, **numbers}, options)


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
    name: Annotated[
        str,
        Argument(
            metavar="NAME|FILE",
            help="Recipe, by the name of its prior; or a file of your own sequences: FASTA, CSV, "
            "TSV, lines (.txt) or SMILES (.smi), packed (.gz) or not.",
        ),
    ],
    data: Annotated[
        Path | None,
        Option(envvar="PPL_DIFFUSION_DATA", help="Folder that holds dna/, molecules/, ..."),
    ] = None,
    out: Annotated[Path | None, Option(help="Folder of the run; runs/train-NAME.")] = None,
    steps: Annotated[
        int | None, Option(help="Optimiser steps; those of the recipe if absent.")
    ] = None,
    objective: Annotated[
        str | None,
        Option(
            help="nelbo, curriculum, distillation, latent or fldd; that of the recipe if absent."
        ),
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
    alphabet: Annotated[
        str | None,
        Option(
            help="dna, rna, protein, smiles, selfies, safe, chars, or a file with one token per "
            "line.",
            rich_help_panel=OWN,
        ),
    ] = None,
    column: Annotated[
        str | None, Option(help="Column of the sequences.", rich_help_panel=OWN)
    ] = None,
    label_column: Annotated[
        str | None,
        Option(help="Column of classes, which guidance can ask for.", rich_help_panel=OWN),
    ] = None,
    weight_column: Annotated[
        str | None, Option(help="Column of how much each row counts.", rich_help_panel=OWN)
    ] = None,
    split_column: Annotated[
        str | None,
        Option(
            help="Column of train, valid or test; if absent near copies are kept together.",
            rich_help_panel=OWN,
        ),
    ] = None,
    unknown: Annotated[
        str,
        Option(
            metavar="drop|error",
            help="What to do with sequences that the alphabet cannot write, N for example.",
            rich_help_panel=OWN,
        ),
    ] = "drop",
    max_length: Annotated[
        int | None, Option(help="Leave out sequences of more tokens.", rich_help_panel=OWN)
    ] = None,
    minutes: Annotated[
        float | None,
        Option(
            help="How long to train, 8 if nothing is said; or give --steps.", rich_help_panel=OWN
        ),
    ] = None,
    dim: Annotated[
        int | None, Option(help="Width of the network; by the data.", rich_help_panel=OWN)
    ] = None,
    depth: Annotated[int | None, Option(help="Its blocks; 3.", rich_help_panel=OWN)] = None,
    batch_size: Annotated[
        int | None, Option(help="Rows per step; by the length.", rich_help_panel=OWN)
    ] = None,
    learning_rate: Annotated[
        float | None, Option(help="Its peak; by the width.", rich_help_panel=OWN)
    ] = None,
    dropout: Annotated[
        float | None,
        Option(help="Share of units that are dropped; by the data.", rich_help_panel=OWN),
    ] = None,
) -> None:
    """Train a prior on your own sequences, or a shipped one again by its recipe."""
    from ppl_diffusion.commands import training
    from ppl_diffusion.models.sequence_files import Columns, is_sequence_file

    shared: dict[str, Any] = {"steps": steps, "seed": seed, "device": device}
    shared |= {"resume": resume, "force": force, "quiet": quiet or json, "as_json": json}
    columns = Columns(column, label_column, weight_column, split_column)
    own: dict[str, Any] = {
        "max_length": max_length,
        "minutes": minutes,
        "dim": dim,
        "depth": depth,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "dropout": dropout,
    }
    if is_sequence_file(name) or Path(name).is_file():
        training.refuse({"objective": objective, "init": init}, "a file of your own sequences")
        place = out or Path("runs") / f"train-{Path(name).name.split('.')[0]}"
        return training.train_file(
            Path(name),
            alphabet=alphabet,
            columns=columns,
            out=place,
            unknown=unknown,
            **own,
            **shared,
        )
    said = {
        "alphabet": alphabet,
        **own,
        **{o[2:].replace("-", "_"): c for o, c in columns.named.items()},
    }
    if any(value is not None for value in said.values()):
        training.require_recipe(name)
    training.refuse(said, f"the recipe {name!r}")
    place = out or Path("runs") / f"train-{name}"
    training.train_prior(name, data=data, out=place, objective=objective, init=init, **shared)


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
