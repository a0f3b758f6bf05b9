"""A model program defined here and nowhere else is a model program everywhere.

Its noise follows given letter frequencies, and its network is its own: one linear map per position
that reads the other positions.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ppl_diffusion.cli import run
from ppl_diffusion.kernels import Interpolating
from ppl_diffusion.models import DiffusionProgram
from ppl_diffusion.models.program import FAMILIES
from ppl_diffusion.testing import ModelContract


class Pairs(nn.Module):
    """``log p(x_l | others)`` is linear in the other tokens."""

    kind, time_free = "cavity", True

    def __init__(self, vocab_size, length):
        super().__init__()
        self.vocab_size, self.length = vocab_size, length
        self.table = nn.Parameter(torch.randn(length, vocab_size, length, vocab_size))

    def forward(self, tokens, t):
        others = 1.0 - torch.eye(self.length, device=tokens.device)[:, None, :, None]
        seen = F.one_hot(tokens, self.vocab_size).to(self.table.dtype)
        logits = torch.einsum("...mv,lwmv->...lw", seen, self.table * others)
        return torch.log_softmax(logits, -1)

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"table": self.table.detach()}, folder / "table.safetensors")

    @classmethod
    def from_pretrained(cls, folder):
        table = load_file(folder / "table.safetensors")["table"]
        network = cls(table.shape[1], table.shape[0])
        network.load_state_dict({"table": table})
        return network


class FrequencyDiffusion(DiffusionProgram):
    """Tokens are replaced by letters of unequal frequency, ``1 : 2 : ... : V``."""

    family = "frequency"
    network = Pairs

    @staticmethod
    def make_process(vocab_size, schedule):
        weights = [2 * (v + 1) / (vocab_size * (vocab_size + 1)) for v in range(vocab_size)]
        return Interpolating(weights, schedule)


def make_program(vocabulary="abc", length=2):
    network = Pairs(len(vocabulary), length)
    return FrequencyDiffusion(network, vocabulary=vocabulary, length=length, name="pairs")


class TestFrequencyDiffusion(ModelContract):
    def make_model(self):
        return make_program()


def test_it_is_sampled_from_the_command_line(tmp_path, capsys):
    program = make_program("ACGT", 12)
    program.save(tmp_path / "pairs")
    draw = ["sample", str(tmp_path / "pairs"), "--num", "3", "--steps", "5", "--seed", "7"]
    assert run(draw) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(">")]
    chain = program.chain(5)
    path = chain.sample((3,), generator=torch.Generator().manual_seed(7))
    assert lines == program.decode(chain.x0(path))


def test_it_is_steered_from_the_command_line(tmp_path):
    make_program("ACGT", 12).save(tmp_path / "pairs")
    out = tmp_path / "run"
    words = ["--particles", "8", "--runs", "2", "--steps", "4", "--gc", "0.2", "0.8", "--quiet"]
    assert run(["design", str(tmp_path / "pairs"), *words, "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["exact"]


MODULE = (
    "from ppl_diffusion.models import MaskedDiffusion\nclass Elsewhere(MaskedDiffusion): pass\n"
)


def test_the_command_line_imports_the_module_that_defines_a_family(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_family.py").write_text(MODULE)
    from my_family import Elsewhere

    Elsewhere.build("ACGT", 6, dim=8, depth=1, heads=1).save(tmp_path / "prior")
    monkeypatch.delitem(FAMILIES, "Elsewhere")  # as in a new process
    monkeypatch.delitem(sys.modules, "my_family")
    sample = ["sample", str(tmp_path / "prior"), "--num", "1"]
    assert run(sample) == 2
    refusal = capsys.readouterr().err
    assert "prior/program.json' describes no prior: the family 'Elsewhere' is none of" in refusal
    assert "import the module that defines it" in refusal
    assert run(["--import", "my_famly", *sample]) == 2
    assert "No module named 'my_famly'" in capsys.readouterr().err
    assert run(["--import", "my_family", *sample]) == 0
    assert len(capsys.readouterr().out.split()[-1]) == 6
