"""Rewards of one's own: functions of strings, programs, networks, and objects by name."""

import pickle
import shlex
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import (
    CommandReward,
    Processes,
    Reward,
    TextReward,
    TorchReward,
    load_object,
)
from ppl_diffusion.potentials.causes import GaveUp

ROWS = torch.tensor([[0, 1, 2], [2, 2, 3], [3, 0, 0]])
LETTERS = "ACGT"


def decode(rows):
    return ["".join(LETTERS[i] for i in row) for row in rows.tolist()]


def count_g(strings):
    return [string.count("G") for string in strings]


class TestText:
    def test_a_function_of_strings(self):
        reward = Reward(TextReward(count_g, decode), 0.5)
        assert reward(ROWS).tolist() == [2.0, 4.0, 0.0]
        assert reward.name == "count_g / 0.5"
        again = pickle.loads(pickle.dumps(TextReward(count_g, decode)))
        assert again(ROWS) == [1, 2, 0]

    @pytest.mark.parametrize(
        ("decode", "text"),
        [
            (lambda rows: ["A"], "decode returned 1 strings for 3 sequences; return one string"),
            (lambda rows: [1, 2, 3], "decode returned an object of type int for 3 sequences"),
        ],
    )
    def test_a_wrong_decoder_is_one_sentence(self, decode, text):
        with pytest.raises(ValueError, match=f"count_g: {text}"):
            TextReward(count_g, decode)(ROWS)

    def test_both_must_be_functions(self):
        with pytest.raises(TypeError, match="TextReward: decode must be callable, got str"):
            TextReward(count_g, "ACGT")


def program(tmp_path, body):
    path = tmp_path / "dock.py"
    path.write_text(
        "import json, sys, time\nlines = sys.stdin.read().split()\n" + textwrap.dedent(body)
    )
    return shlex.join([sys.executable, str(path)])


def says(tmp_path, payload, version=1):
    body = f'print(json.dumps({{"version": {version}, "payload": {payload}}}))'
    return program(tmp_path, body)


GOOD = '{"score": [line.count("G") for line in lines], "size": [len(line) for line in lines]}'


class TestCommand:
    def test_sequences_go_in_and_numbers_come_out(self, tmp_path):
        command = says(tmp_path, GOOD)
        dock = CommandReward(command, decode, "score")
        assert Reward(dock, 0.5)(ROWS).tolist() == [2.0, 4.0, 0.0]
        assert CommandReward(shlex.split(command), decode, "size")(ROWS) == [3, 3, 3]
        only = says(tmp_path, '{"any": [1.5, None, float("nan")]}')
        reward = Reward(CommandReward(only, decode), on_error="reject", name="dock")
        assert reward(ROWS[:3]).isfinite().sum() == 1
        assert reward.failures == {"not a number": 2}

    def test_it_can_be_sent_to_workers(self, tmp_path):
        dock = pickle.loads(pickle.dumps(CommandReward(says(tmp_path, GOOD), decode, "score")))
        assert dock(ROWS) == [1, 2, 0]

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            ('sys.exit("no licence\\n")', "it ended with exit code 1: no licence"),
            ("import os; os.abort()", "it ended with signal 6 (SIGABRT)"),
            ("print('hello')", "it wrote no JSON, but 'hello'"),
            ("pass", "it wrote no JSON, but nothing"),
            (
                "print('[1, 2, 3]')",
                'it wrote JSON without "version": 1 and a "payload", but \'[1, 2, 3]\'',
            ),
            (
                'print(\'{"version": 2, "payload": {"score": [1]}}\')',
                'it wrote JSON without "version": 1 and a "payload", but '
                '\'{"version": 2, "payload": {"score": [1]}}\'',
            ),
            (
                'print(\'{"version": 1, "payload": {"mass": [1, 2, 3]}}\')',
                "its payload holds 'mass' and not 'score'",
            ),
            (
                'print(\'{"version": 1, "payload": {"score": [1]}}\')',
                "it wrote 1 values of 'score' for 3 sequences",
            ),
            (
                'print(\'{"version": 1, "payload": {"score": 1}}\')',
                "it wrote no list of values of 'score' for 3 sequences",
            ),
        ],
    )
    def test_every_failure_is_one_sentence(self, tmp_path, body, text):
        dock = CommandReward(program(tmp_path, body), decode, "score")
        with pytest.raises((RuntimeError, ValueError)) as caught:
            dock(ROWS)
        assert str(caught.value) == text

    def test_of_several_names_one_must_be_meant(self, tmp_path):
        with pytest.raises(RuntimeError) as caught:
            CommandReward(says(tmp_path, GOOD), decode)(ROWS)
        assert str(caught.value) == (
            "its payload holds 'score', 'size'; say with property= which is meant"
        )

    def test_the_timeout_kills_what_it_has_started(self, tmp_path):
        note = tmp_path / "late"
        body = f"""
            import subprocess
            subprocess.run(["sh", "-c", "sleep 2; touch {note}"])
        """
        dock = CommandReward(program(tmp_path, body), decode, timeout=1.0)
        with pytest.raises(GaveUp, match=r"^no answer within 1 s$"):
            dock(ROWS)
        time.sleep(2.5)
        assert not note.exists()

    @pytest.mark.parametrize(
        ("command", "text"),
        [
            ("", "the command is empty; give a program and its arguments."),
            ("dock 'x", 'the command "dock \'x" cannot be split into words (No closing quotation)'),
        ],
    )
    def test_a_command_is_words(self, command, text):
        with pytest.raises(ValueError) as caught:
            CommandReward(command, decode)
        assert str(caught.value).startswith(text)

    def test_a_program_that_is_not_there(self):
        with pytest.raises(PotentialError) as caught:
            Reward(CommandReward("/no/such/dock --fast", decode))(ROWS[:1])
        assert str(caught.value) == (
            "dock failed on the sequence 'ACG' (CommandError: /no/such/dock cannot be started (No "
            "such file or directory); give a program that exists and may be executed); mend the "
            'function, or pass on_error="reject" to give such sequences probability zero.'
        )

    def test_a_line_is_a_sequence(self):
        with pytest.raises(ValueError, match="cat: a sequence holds a line break; encode it"):
            CommandReward("cat", lambda rows: ["a\nb"] * len(rows))(ROWS)


class Sum(nn.Module):
    """Weighs letters, and remembers the shapes it was asked about."""

    def __init__(self, heads=None):
        super().__init__()
        self.heads, self.dropout, self.shapes = heads, nn.Dropout(0.5), []
        self.weight = nn.Parameter(torch.tensor([1.0, 10.0, 100.0, 1000.0]))

    def forward(self, x):
        self.shapes.append((tuple(x.shape), x.dtype))
        total = self.dropout((x * self.weight[:, None]).sum((1, 2)))
        if self.heads is None:
            return total
        return total[:, None] * torch.arange(1, self.heads + 1)


class TestNetwork:
    EXPECTED: tuple[float, ...] = (111.0, 1200.0, 1002.0)

    def test_it_reads_one_hot_columns_in_evaluation_mode(self):
        network = Sum()
        reward = Reward(TorchReward(network, 4, batch_size=2), 0.5)
        network.train()
        assert reward(ROWS).tolist() == [2 * value for value in self.EXPECTED]
        assert network.shapes == [((2, 4, 3), torch.float32), ((1, 4, 3), torch.float32)]
        assert reward.name == "Sum / 0.5"
        assert not TorchReward(network, 4)(ROWS).requires_grad

    @pytest.mark.parametrize(("heads", "head", "factor"), [(1, None, 1), (1, 0, 1), (3, 2, 3)])
    def test_it_answers_columns(self, heads, head, factor):
        found = TorchReward(Sum(heads), 4, head=head)(ROWS)
        assert found.tolist() == [factor * value for value in self.EXPECTED]

    def test_padding_is_seen_as_nothing(self):
        padded = torch.cat([ROWS, torch.full((3, 2), 4)], 1)
        assert TorchReward(Sum(), 4)(padded).tolist() == list(self.EXPECTED)

    @pytest.mark.parametrize(
        ("network", "head", "text"),
        [
            (Sum(3), None, "Sum answered shape (3, 3), and head is None; give one from 0 to 2."),
            (Sum(3), 3, "Sum answered shape (3, 3), and head is 3; give one from 0 to 2."),
            (
                nn.Identity(),
                None,
                "Identity answered (3, 4, 3) to one-hot sequences of shape (3, 4, 3); it must "
                "answer (3,) or (3, heads).",
            ),
            (
                Sum(),
                1,
                "Sum answered (3,) to one-hot sequences of shape (3, 4, 3); it must answer (3,) "
                "or (3, heads).",
            ),
        ],
    )
    def test_a_wrong_answer_names_the_shapes(self, network, head, text):
        with pytest.raises(ValueError) as caught:
            TorchReward(network, 4, head=head)(ROWS)
        assert str(caught.value) == text

    def test_a_network_for_other_sequences_names_the_shapes(self):
        with pytest.raises(
            ValueError,
            match=r"^Conv1d cannot read one-hot sequences of shape "
            r"\(3, 4, 3\) \(n, alphabet, L\): .*channels",
        ):
            TorchReward(nn.Conv1d(5, 1, 1), 4)(ROWS)

    def test_bad_options_are_one_sentence(self):
        with pytest.raises(TypeError, match=r"TorchReward: a torch\.nn\.Module is needed, got"):
            TorchReward(count_g, 4)
        with pytest.raises(ValueError, match="Linear: head must be a whole number, at least 0"):
            TorchReward(nn.Linear(1, 1), 4, head=-1)

    def test_it_works_in_a_process(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
        with Processes(1) as pool:
            there = Reward(TorchReward(network, 4), executor=pool)(ROWS)
        torch.testing.assert_close(there, Reward(TorchReward(network, 4))(ROWS))


class TestObjects:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own_rewards_here.py").write_text(
            "import math\ndef score(strings):\n    return [len(s) for s in strings]\n"
            "class Kit:\n    part = 7\n"
        )
        (tmp_path / "needs_more_here.py").write_text("import no_such_library\n")
        (tmp_path / "broken_here.py").write_text("1 / 0\n")
        yield tmp_path
        for name in ("own_rewards_here", "needs_more_here", "broken_here"):
            sys.modules.pop(name, None)

    def test_the_working_folder_is_known(self, folder):
        assert load_object("own_rewards_here:score")(["AC"]) == [2]
        assert load_object("own_rewards_here:Kit.part") == 7
        assert load_object("math:pi") > 3

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "own_rewards_here",
                "'own_rewards_here' names no object; write module:object, such as rewards:score.",
            ),
            (
                ":score",
                "':score' names no object; write module:object, such as rewards:score.",
            ),
            (
                "nowhere_here:score",
                "there is no module 'nowhere_here'; run where nowhere_here.py lies, or install it.",
            ),
            (
                "needs_more_here:score",
                "the module 'needs_more_here' needs 'no_such_library', which is not installed.",
            ),
            (
                "broken_here:score",
                "the module 'broken_here' cannot be imported (ZeroDivisionError: division by "
                "zero); mend it.",
            ),
            (
                "own_rewards_here:scor",
                "'own_rewards_here:scor': own_rewards_here has no scor; it defines score, Kit.",
            ),
        ],
    )
    def test_what_cannot_be_loaded_is_one_sentence(self, folder, name, text):
        with pytest.raises(ValueError) as caught:
            load_object(name)
        assert str(caught.value) == text
