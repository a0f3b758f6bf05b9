"""Every command on a terminal, or into a file, that knows few letters."""

import io
import os
import subprocess
import sys

import pytest
import torch

from ppl_diffusion.cli import run
from ppl_diffusion.commands.terminal import plain, readable_streams
from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, run_smc
from ppl_diffusion.testing import toy_markov_chain

ENCODINGS = ["ascii", "latin-1", "utf-8"]
SLOW = ("design", "compare")
SMALL = ["--particles", "8", "--runs", "2", "--steps", "4", "--gc", "0", "1"]
COMMANDS = {
    "no command": [],
    "help": ["--help"],
    **{f"help of {name}": [name, "--help"] for name in ("models", "sample", "design", "train")},
    "help of diagnose": ["diagnose", "--help"],
    "help of compare": ["compare", "--help"],
    "models": ["models"],
    "sample": ["sample", "PRIOR", "--num", "2", "--steps", "4"],
    "design": ["design", "PRIOR", *SMALL, "--out", "NEW"],
    "diagnose": ["diagnose", "RUN"],
    "compare": ["compare", "RUN", "OTHER", "--plot", "PLOT"],
}
MISTAKES = [
    ["fold"],
    ["sample", "gärtner"],
    ["design", "PRIOR", "--gc", "×", "1"],
    ["diagnose", "→"],
]
CALLS = [
    (name, code)
    for name in COMMANDS
    for code in ENCODINGS
    if not (name in SLOW and code != "ascii")
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A prior, and two runs in folders whose names not every terminal can write."""
    home = tmp_path_factory.mktemp("home")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = MaskedDiffusion.build(list("ACGT"), 16, name="tiny", dim=8, depth=1, heads=1)
    prior.save(home / "prior")
    found = {"PRIOR": home / "prior", "RUN": home / "läuft", "OTHER": home / "σ [/b] :cat:"}
    model = FeynmanKac(toy_markov_chain("uniform"), Potential(lambda x0: x0.sum(-1) / 4))
    for seed, name in enumerate(("RUN", "OTHER")):
        run_smc(model, 8, 2, generator=torch.Generator().manual_seed(seed)).save(found[name])
    return found


@pytest.fixture
def written(monkeypatch):
    """Standard output and error in an encoding; returns what was written."""

    def _written(encoding):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])

        def read():
            for stream in streams:
                stream.flush()
            return [stream.buffer.getvalue().decode(encoding) for stream in streams]

        return read

    return _written


@pytest.mark.parametrize(("name", "encoding"), CALLS)
def test_commands_write_what_a_terminal_can_read(places, written, tmp_path, name, encoding):
    new = {"NEW": tmp_path / "π", "PLOT": tmp_path / "∞.png"}
    words = [str({**places, **new}.get(word, word)) for word in COMMANDS[name]]
    read = written(encoding)
    assert run(words) == 0
    out, err = read()
    assert out
    assert "Traceback" not in err
    assert all(place.exists() for key, place in new.items() if key in COMMANDS[name])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("words", MISTAKES, ids=str)
def test_complaints_are_one_readable_sentence(places, written, words, encoding):
    read = written(encoding)
    assert run([str(places.get(word, word)) for word in words]) == 2
    out, err = read()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("ppl-diffusion: ")


def test_numbers_keep_their_errors_and_tables_their_frames(places, written):
    read = written("ascii")
    assert run(["models"]) == 0
    out, _ = read()
    assert "+-" in out
    lines = [line for line in out.splitlines() if line.startswith(("|", "+"))]
    frames = {tuple(at for at, letter in enumerate(line) if letter in "|") for line in lines}
    assert len({len(line) for line in lines[:4]}) == 1
    assert len(frames) <= 6  # a header, rules and rows, of two tables


def test_the_streams_are_left_as_they_were(written):
    written("ascii")
    with readable_streams():
        print("±")
    with pytest.raises(UnicodeEncodeError):
        print("±", flush=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3 ± 1 ≤ 4 × 2…", "3 +- 1 <= 4 x 2..."),
        ("Bérard", "Berard"),
        ("│ ─┼█", "| -++"),
        ("σ\udce9", "\\u03c3\\udce9"),
    ],
)
def test_stand_ins_are_readable(text, said):
    assert plain(text, "ascii") == said


@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_a_process_without_utf8_writes_its_help_into_a_file(locale, tmp_path):
    with (tmp_path / "help.txt").open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "ppl_diffusion.cli", "--help"],
            stdout=file,
            stderr=subprocess.PIPE,
            env={**os.environ, **locale},
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "design" in (tmp_path / "help.txt").read_text(encoding="ascii")


def test_a_run_that_was_written_is_read_again(places):
    assert ParticlePosterior.load(places["OTHER"]).num_runs == 2


@pytest.mark.filterwarnings("default")
def test_a_damaged_motif_is_one_sentence(places, tmp_path, monkeypatch, capsys):
    def stub(*_, **__):
        raise ParticleCollapse("enough")

    monkeypatch.setattr("ppl_diffusion.designs.run.design", stub)
    matrices = tmp_path / "two.jaspar"
    sound = ">M1 sound\nA [9 1]\nC [1 9]\nG [0 0]\nT [0 0]\n"
    matrices.write_text(sound + sound.replace("M1 sound", "M2 torn").replace("[9", "[x"))
    asked = ["--motif", f"{matrices}@M1", *SMALL, "--out", str(tmp_path / "r")]
    assert run(["design", str(places["PRIOR"]), *asked]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if "motif" in line]
    assert len(err) == 1
    assert err[0].startswith("ppl-diffusion: The motif file")
    assert "'>M2 torn' at line 7" in err[0]


def test_the_locale_c_asks_for_ascii():
    """Python itself would write UTF-8 there."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    command = [sys.executable, "-m", "ppl_diffusion.cli", "models"]
    for locale, ascii_alone in (("C", True), ("C.UTF-8", False)):
        done = subprocess.run(command, capture_output=True, env={**kept, "LC_ALL": locale})
        assert done.returncode == 0
        assert done.stdout.isascii() == ascii_alone
