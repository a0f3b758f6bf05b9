"""M11, M12, M15, M16: caches, chunks and counters of every program, and what the dead say.

The problem and the programs are in ``conftest.py``. Results are compared bit for bit and counts
with formulas: no false alarms, but for one evidence per program at four standard errors (6e-5).
"""

import math
from dataclasses import replace

import pytest
import torch

from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser, Rows
from ppl_diffusion.inference import SMC
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import PersistentFill
from ppl_diffusion.smc.feynman_kac import EvaluatedPotential
from ppl_diffusion.smc.rejuvenation import OrderRefresh, SuffixRefresh

STEPS, SIZE = 4, 2


def potential_requests(monkeypatch):
    """Switch the cache of potentials off; return the batches they are shown, as they come."""
    requests = []

    def ask_all(self, x0, *, final):
        rows = x0.reshape(-1, x0.shape[-1])
        requests.append((final, rows))
        self.num_calls += len(rows)
        ask = self.potential if final else self.potential.lookahead
        return ask(rows).to(torch.float64).reshape(x0.shape[:-1])

    monkeypatch.setattr(EvaluatedPotential, "_evaluate", ask_all)
    return requests


def network_requests(monkeypatch):
    """Neither reuse nor deduplicate network rows; return the batches asked for, as they come."""
    requests = []

    def ask_all(self, tokens, t):
        rows = Rows.of(tokens, {}, t)
        requests.append((None if self.time_free else float(t), rows.tokens))
        return self._evaluate(rows).reshape(*tokens.shape, -1)

    monkeypatch.setattr(EvaluatedDenoiser, "_hidden", ask_all)
    return requests


def distinct_in_all(requests):
    """Count rows that were not asked for before in the run, each kind of question by itself."""
    return len({(kind, *row) for kind, rows in requests for row in rows.tolist()})


def new_rows(requests):
    """Count the distinct rows of each batch that the one before, of the same kind, did not hold."""
    total, known = 0, {}
    for kind, rows in requests:
        asked = set(map(tuple, rows.tolist()))
        total += len(asked - known.get(kind, set()))
        known[kind] = asked
    return total


def size(requests):
    return sum(len(rows) for _, rows in requests)


def test_caches_change_the_cost_and_nothing_else(posed, monkeypatch):
    """M11, M16, T4.7, T4.8: same particles; what is saved is what the requests repeat."""
    cached = posed.run(12, 3)
    potential, network = potential_requests(monkeypatch), network_requests(monkeypatch)
    plain = posed.run(12, 3)
    assert torch.equal(cached.x0, plain.x0)
    assert torch.equal(cached.log_evidence, plain.log_evidence)
    assert torch.equal(cached.log_weights, plain.log_weights)
    assert plain.num_evaluations == size(network)
    assert cached.num_evaluations == new_rows(network) < size(network)
    saved = plain.num_potential_calls - cached.num_potential_calls
    assert saved == size(potential) - distinct_in_all(potential)
    assert saved > 0 or posed.name.endswith("smc")  # one finished batch and no look-ahead


@pytest.mark.parametrize("rows", [1, 5])
def test_chunks_change_nothing(posed, rows):
    """M12: however few rows the network sees at once."""
    whole, chunks = posed.run(12, 3), posed.run(12, 3, max_rows=rows)
    assert torch.equal(whole.x0, chunks.x0)
    torch.testing.assert_close(whole.log_weights, chunks.log_weights)
    assert whole.num_evaluations == chunks.num_evaluations


FILLS = PersistentFill(3)
MOVES = (OrderRefresh(), SuffixRefresh(2))
ALL = 5  # completions of the defensive look-ahead
FORMULAS = [  # calls of the potential per particle, without a cache
    ("importance-sampling", {}, 1),
    ("best-of-n", {}, 1),
    ("beam", {"num_children": 3}, STEPS),
    ("steering", {}, ALL * (STEPS - 1) + 1),
    ("steering", {"every": 2}, 2 * ALL + 1),  # states 1 and 3, and the end
    ("steering", {"kind": "max", "twist": FILLS}, 3 * (STEPS - 1) + 1),
    ("soft-value", {"num_children": 5}, 5 * (ALL * (STEPS - 1) + 1)),
    ("soft-value", {"num_children": 5, "weighted": False, "alpha": 0.0}, 5 * STEPS),
    ("twisted", {}, (STEPS - 1) * SIZE + SIZE + 1),  # children, last tokens, the closing
    ("twisted", {"twist": FILLS}, 3 * (STEPS - 1) * SIZE + SIZE + 1),
    ("twisted", {"surprise": True}, (STEPS - 1) * (SIZE + 1) + SIZE + 1),
    ("guided-lineages", {}, (STEPS - 1) * SIZE + SIZE + 1),
    ("corrector", {}, ALL * STEPS + 1),  # the start is looked ahead from, too
    ("corrector", {"clamp": True}, STEPS + 1 + STEPS * SIZE),
    ("tempering", {"powers": [0.0, 0.5, 1.0], "moves": MOVES}, 1 + 1),  # the order asks nothing
    ("tempering", {"powers": [0.0, 0.2, 0.5, 1.0], "moves": MOVES, "num_sweeps": 2}, 1 + 2 * 2),
]


@pytest.mark.parametrize(("method", "options", "calls"), FORMULAS, ids=str)
def test_counters_equal_their_formulas(pose, monkeypatch, method, options, calls):
    """M16: two runs of six particles."""
    plain = potential_requests(monkeypatch)
    asked = pose("difference")
    settings = {"num_particles": 6, "num_runs": 2, **options}
    posterior = SMC(asked.chain, asked.goal, method=method, **settings).run(seed=1)
    assert posterior.num_potential_calls == size(plain) == 2 * 6 * calls


DEAD = Potential(lambda x0: torch.full(x0.shape[:-1], -math.inf), name="nothing")


def test_dead_runs_say_where_they_died(posed):
    """M15: no weight, no evidence, and the first step after which nobody was left."""
    dead = replace(posed, goal=DEAD).run(6, 3)
    first = 0 if posed.name in ("tempering", "waste-free") else dead.num_steps - 1
    assert dead.died_at.tolist() == [first] * 3
    assert dead.log_evidence.tolist() == [-math.inf] * 3
    assert bool((dead.log_weights == -math.inf).all())
    assert not bool(torch.isnan(dead.ess).any())


def test_what_dies_counts_as_zero(posed, pose):
    """Two particles and one sequence that is allowed: some runs die, their mean is right."""
    rare = Potential(lambda x0: torch.where((x0 == x0[..., :1]).all(-1), 0.0, -math.inf))
    narrow = pose(posed.name, goal=rare)
    posterior = narrow.run(2, 1500)
    assert abs(narrow.scores(posterior)[0]) < 4
    assert 0 < float((~posterior.alive).double().mean()) < 1
    assert bool((posterior.died_at[~posterior.alive] >= 0).all())
