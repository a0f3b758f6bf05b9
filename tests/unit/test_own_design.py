"""From a file of sequences to ranked designs, as a new user would go, in one process each."""

import csv
import importlib
import json
import linecache
import random
import sys
from pathlib import Path

import pytest
import torch

import ppl_diffusion as ppd
from ppl_diffusion.cli import run
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.potentials import Potential

MODULE = '''
"""Scores of one's own."""
import os
import torch

def pull(texts):
    return [sum(map(text.count, "GC")) for text in texts]

def fails_on_a(texts):
    if any(text.startswith("A") for text in texts):
        raise RuntimeError("no A here")
    return [len(text) for text in texts]

class Network(torch.nn.Module):
    def forward(self, x):  # (n, 4, L): the number of bases, then of G
        return torch.stack([x.sum((1, 2)), x[:, 2].sum(-1)], 1)

network = Network()
not_a_function = 3

def gives_three():
    return 3
'''
PROGRAM = """
import json, sys
lines = [line.strip() for line in sys.stdin]
print(json.dumps({"version": 1, "payload": {"gc": [sum(map(x.count, "GC")) for x in lines]}}))
"""
QUICK = ["--particles", "24", "--runs", "2", "--method", "smc", "--quiet"]


def gc(text):
    return sum(map(text.count, "GC"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with a trained prior over DNA of 4 to 8 bases, and scores."""
    folder = tmp_path_factory.mktemp("home")
    draw = random.Random(0)
    texts = ["".join(draw.choices("ACGT", (4, 1, 1, 4), k=draw.randint(4, 8))) for _ in range(300)]
    fasta = "".join(f">s{i}\n{text}\n" for i, text in enumerate(texts))
    (folder / "mine.fasta").write_text(fasta)
    (folder / "my_scores.py").write_text(MODULE)
    (folder / "program.py").write_text(PROGRAM)
    asked = ["train", str(folder / "mine.fasta"), "--alphabet", "dna", "--out", str(folder / "p")]
    shape = ["--steps", "60", "--dim", "16", "--depth", "1"]
    assert run([*asked, *shape, "--quiet"]) == 0
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    return home


def designs(folder):
    return list(csv.DictReader((Path(folder) / "designs.csv").read_text().splitlines()))


def test_a_function_a_network_and_a_program_say_the_same(at_home, tmp_path):
    """One reward three ways: the same particles, the same designs, the same evidence."""
    ways = {
        "python": ["--reward", "my_scores:pull,temperature=0.5"],
        "command": ["--reward-command", f"{sys.executable} program.py", "--temperature", "0.5"],
    }
    found = {}
    for name, asked in ways.items():
        out = tmp_path / name
        assert run(["design", "p", *asked, *QUICK, "--out", str(out)]) == 0
        found[name] = json.loads((out / "summary.json").read_text())
        assert all(4 <= len(row["sequence"]) <= 8 for row in designs(out))
        column = "pull" if name == "python" else "program.py"
        assert all(float(row[column]) == gc(row["sequence"]) for row in designs(out))
        told = found[name]["settings"]["rewards"]
        assert next(iter(told.values()))["asked"] > 0
    assert found["python"]["log_evidence"] == found["command"]["log_evidence"]
    assert found["python"]["target"].count("pull / 0.5") == 1


def test_a_network_reads_one_hot_sequences_of_every_length(at_home, tmp_path):
    asked = ["--reward-torch", "my_scores:network,head=1,name=g,goal=minimise,temperature=0.2"]
    assert run(["design", "p", *asked, *QUICK, "--out", str(tmp_path / "run")]) == 0
    rows = designs(tmp_path / "run")
    assert all(float(row["g"]) == row["sequence"].count("G") for row in rows)
    assert float(rows[0]["g"]) == 0


def test_a_brief_says_all_of_it_and_gives_the_same_bytes(at_home, tmp_path):
    (at_home / "brief.toml").write_text("""
[prior]
name = "p"
lengths = [5, 8]

[[reward]]
python = "my_scores:pull"
transform = { kind = "linear", low = 0, high = 4 }
temperature = 0.1

[[judge]]
torch = "my_scores:network"
name = "bases"
head = 0

[constraints]
forbid = ["TTT"]
fix = ["1:GC"]

[search]
method = "smc"
particles = 24
runs = 2
seed = 3
""")
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(["design", "brief.toml", "--out", str(first), "--quiet"]) == 0
    assert run(["design", str(first / "brief.toml"), "--out", str(again), "--quiet"]) == 0
    for path in (p for p in first.rglob("*") if p.is_file()):
        if path.name != "summary.json":
            assert (again / path.relative_to(first)).read_bytes() == path.read_bytes(), path.name
    rows = designs(first)
    assert all(row["sequence"][1:3] == "GC" and "TTT" not in row["sequence"] for row in rows)
    assert all(float(row["bases"]) == len(row["sequence"]) >= 5 for row in rows)
    assert run(["compare", str(first), str(first)]) == 2
    other = tmp_path / "other"
    assert run(["design", str(first / "brief.toml"), "--seed", "4", "--out", str(other), "-q"]) == 0
    assert run(["compare", str(first), str(other)]) == 0


def test_answers_of_another_function_are_never_taken(at_home, tmp_path):
    """Two functions of one name, and one that was edited, share a file and no answer."""
    file = tmp_path / "answers.sqlite"
    found = []
    texts = ["1.0 * text.count('G')", "-1.0 * text.count('G')"]
    for module, body in (("one_score", texts[0]), ("two_score", texts[1]), ("one_score", texts[1])):
        Path(f"{module}.py").write_text(f"def g(texts):\n    return [{body} for text in texts]\n")
        sys.modules.pop(module, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        sys.dont_write_bytecode, usual = True, sys.dont_write_bytecode
        table = {"python": f"{module}:g", "cache": str(file)}
        search = {"method": "smc", "particles": 16, "runs": 1}
        found.append([ppd.design("p", rewards=table, **search).summary for _ in range(2)])
        sys.dont_write_bytecode = usual
    for first, again in found:
        told = [run["settings"]["rewards"]["g"] for run in (first, again)]
        assert told[0]["cached_disk"] == 0
        assert told[1]["asked"] == 0
        assert first["log_evidence"] == again["log_evidence"]
    assert found[0][0]["log_evidence"] != found[1][0]["log_evidence"]
    assert found[1][0]["log_evidence"] == found[2][0]["log_evidence"]


def test_failures_are_counted_by_cause_and_cost_their_own_sequences_only(at_home, tmp_path):
    asked = ["--reward", "my_scores:fails_on_a,on_error=reject"]
    assert run(["design", "p", *asked, *QUICK, "--out", str(tmp_path / "run")]) == 0
    assert not any(row["sequence"].startswith("A") for row in designs(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    told = summary["settings"]["rewards"]["fails_on_a"]
    assert told["failed"] == sum(told["failed_by_cause"].values()) > 0


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--reward", "my_scores"], "names no object; write module:object, such as rewards:score"),
        (["--reward", "nowhere:f"], "there is no module 'nowhere'"),
        (["--reward", "my_scores:push"], "my_scores has no push"),
        (["--reward", "my_scores:not_a_function"], "is an object of type int: give a function of"),
        (["--reward", "my_scores:pull,workers=0"], "Workers of reward 'pull' must be at least 1"),
        (["--reward", "my_scores:pull,workers=2,executor=fax"], "no executor called 'fax'"),
        (["--reward", "my_scores:fails_on_a"], "fails_on_a failed on the sequence 'A"),
        (["--reward-torch", "my_scores:network"], "head is None; give one from 0 to 1"),
        (["--reward-command", "nosuchprogram"], "There is no program 'nosuchprogram' for the"),
        (["--reward-torch", "my_scores:pull"], "is no network, and calling it makes none (TypeEr"),
        (["--reward-torch", "my_scores:gives_three"], "gives an object of type int: name a torch"),
        (["--reward", "my_scores:pull,budget=10"], "fewer than the 48 final values of the run"),
        (["--reward", "my_scores:pull,memory=9,executor=ray"], "memory of reward 'pull' bounds w"),
        (["--reward", "my_scores:pull,observed=1,transform=x"], "give a table with its kind"),
        (["--observe", "3"], "has no expression oracle"),
        (["--gc", "0", "1", "--lengths", "20", "30"], "no sequence has 20 to"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(asked, sentence, at_home, tmp_path, capsys):
    assert run(["design", "p", *asked, *QUICK, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


BRIEFS = [
    ("[prior]\nname = 'p'\n[[rewards]]\npython = 'm:f'", "has no table 'rewards': it has prior,"),
    ("[prior]\nname = 'p'\nnam = 'q'", "The table prior of the brief 'b.toml' has no key 'nam'"),
    (
        "[prior]\nname = 'p'\n[search]\nparticle = 3",
        "The table search of the brief 'b.toml' has no",
    ),
    ("[prior]\nname = 'p'\n[search]\nparticles = 'many'", "is 'many': give a whole number"),
    ("[prior]\nname = 'p'\n[constraints]\ngc = 0.4", "gc of the brief 'b.toml' is 0.4: give two"),
    ("[prior]\nname = 'p'\n[constraints]\nfix = '1:A'", "fix of the brief 'b.toml' is '1:A': give"),
    (
        "[prior]\nname = 'p'\n[reward]\npython = 'm:f'",
        "no list of tables: write each as [[reward]]",
    ),
    ("[[reward]]\npython = 'm:f'", "The brief 'b.toml' names no prior: give it, [prior] name ="),
    ("prior = 'p'", "prior of the brief 'b.toml' is 'p': write it as a table, [prior]"),
    ("[prior\nname", "The brief 'b.toml' is no TOML"),
]


@pytest.mark.parametrize(("text", "sentence"), BRIEFS)
def test_a_wrong_brief_is_one_sentence(text, sentence, at_home, capsys):
    Path("b.toml").write_text(text)
    assert run(["design", "b.toml", "--out", "nothing"]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_a_brief_that_is_not_there(at_home, capsys):
    assert run(["design", "nowhere.toml"]) == 2
    assert "There is no brief 'nowhere.toml': check the path." in capsys.readouterr().err


def test_the_same_from_python(at_home, tmp_path):
    prior = ppd.models.load("p")
    search = {"particles": 24, "runs": 2, "method": "smc"}

    def pull(texts):
        return [gc(text) for text in texts]

    table = {"python": pull, "temperature": 0.5}
    found = ppd.design(prior, rewards=table, judges=len_of, out=tmp_path / "run", **search)
    assert found.columns["pull"].tolist() == [gc(text) for text in found.sequences]
    assert found.columns["len_of"].tolist() == [len(text) for text in found.sequences]
    rows = [{**row, "weight": float(row["weight"])} for row in designs(tmp_path / "run")]
    table = found.table()
    assert [row["sequence"] for row in table] == [row["sequence"] for row in rows]
    assert [*table[0]] == [*rows[0]]
    assert table[0]["weight"] == pytest.approx(rows[0]["weight"], rel=1e-5)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"designs.csv", "summary.json"}
    assert not (tmp_path / "run" / "brief.toml").exists()  # no brief can say a function
    assert run(["design", "p", "--reward", "my_scores:pull,temperature=0.5", *QUICK,
                "--out", str(tmp_path / "same")]) == 0  # fmt: skip
    same = json.loads((tmp_path / "same" / "summary.json").read_text())
    assert same["log_evidence"] == found.summary["log_evidence"]
    by_tokens = Potential(lambda x0: 2.0 * torch.isin(x0, torch.tensor([1, 2])).sum(-1))
    other = ppd.design(prior, rewards=by_tokens, **search)
    assert other.summary["log_evidence"] == found.summary["log_evidence"]


def len_of(texts):
    return [len(text) for text in texts]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Return the folder of a prior over two classes: A's, and C's."""
    folder = tmp_path_factory.mktemp("classes")
    draw = random.Random(1)
    rows = [(base * draw.randint(3, 6), base) for base in draw.choices("AC", k=300)]
    parts = draw.choices(["train", "valid", "test"], (8, 1, 1), k=300)
    lines = [",".join((*row, part)) for row, part in zip(rows, parts, strict=True)]
    table = "\n".join(["sequence,kind,part", *lines, ""])
    (folder / "rows.csv").write_text(table)
    asked = ["train", str(folder / "rows.csv"), "--alphabet", "dna", "--column", "sequence"]
    asked += [
        "--label-column",
        "kind",
        "--split-column",
        "part",
        "--out",
        str(folder / "p"),
        "--quiet",
    ]
    assert run([*asked, "--steps", "150", "--dim", "16", "--depth", "1"]) == 0
    return folder / "p"


def test_a_class_is_asked_for_by_its_name(classes, tmp_path, capsys):
    asked = ["sample", str(classes), "--label", "C", "--num", "50", "--json"]
    assert run(asked) == 0
    drawn = "".join(json.loads(capsys.readouterr().out)["sequences"])
    assert drawn.count("C") > 0.9 * len(drawn)
    out = tmp_path / "run"
    more = ["--label", "A", "--guidance", "2", "--lengths", "3", "4", "--forbid", "GG"]
    assert run(["design", str(classes), *more, *QUICK, "--out", str(out)]) == 0
    assert {row["sequence"] for row in designs(out)[:2]} == {"AAA", "AAAA"}
    assert "label 0" in json.loads((out / "summary.json").read_text())["target"]
    again = tmp_path / "again"
    assert run(["design", str(out / "brief.toml"), "--out", str(again), "--quiet"]) == 0
    assert (again / "designs.csv").read_bytes() == (out / "designs.csv").read_bytes()
    for wrong in (["--label", "G"], ["--guidance", "2"]):
        assert run(["sample", str(classes), *wrong]) == 2
        assert run(["design", str(classes), "--forbid", "GG", *wrong, "--out", "x"]) == 2


class Killed(RuntimeError):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("method", ["smc", "steering", "refinement"])
def test_a_resumed_design_asks_its_reward_what_the_unbroken_one_asks(at_home, tmp_path, method):
    prior, asked = ppd.models.load("p"), []

    def pull(texts):
        asked.extend(texts)
        if any(text.startswith("TT") for text in texts):
            raise ValueError("no TT here")
        return [gc(text) for text in texts]

    def dies(step, total):
        if step == 2:
            raise Killed

    def designed(name, **options):
        table = {"python": pull, "on_error": "reject"}
        search = {"method": method, "particles": 16, "runs": 2, "steps": 4, "checkpoint_every": 0}
        return ppd.design(prior, rewards=table, out=tmp_path / name, **search, **options)

    whole = designed("whole")
    calls, asked[:] = len(asked), []
    with pytest.raises(Killed):
        designed("broken", progress=dies)
    resumed = designed("broken", resume=True)
    # What was asked after the last checkpoint is asked again, and nothing else.
    assert calls < len(asked) < 1.5 * calls
    for name in ("designs.csv", "designs.fasta"):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "broken")]
        assert files[0] == files[1]
    ledgers = [found.summary["settings"]["rewards"]["pull"] for found in (whole, resumed)]
    counts = ("asked", "cached_memory", "failed", "failed_by_cause")
    assert [ledgers[0][key] for key in counts] == [ledgers[1][key] for key in counts]
    assert ledgers[0]["failed"] > 0


def test_what_python_cannot_ask(at_home):
    prior = ppd.models.load("p")
    with pytest.raises(InputError, match="The reward 1 is an object of type int: give a function"):
        ppd.design(prior, rewards=[3])
    with pytest.raises(InputError, match="A judge scores texts"):
        ppd.design(prior, judges=Potential(lambda x0: x0.sum(-1)), gc=(0, 1))
    with pytest.raises(InputError, match="no option called 'partcles'"):
        ppd.design(prior, gc=(0, 1), partcles=3)
