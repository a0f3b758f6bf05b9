"""Constraints against plain Python on strings."""

import itertools
import math

import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import Constraint, ForbiddenMotif, GCContent, RequiredMotif
from ppl_diffusion.potentials.dna import IUPAC, parse_iupac
from ppl_diffusion.testing.potential_contract import PotentialContract

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def sequences(count=60, length=20, seed=0):
    return torch.randint(4, (count, length), generator=torch.Generator().manual_seed(seed))


def strings(x0):
    return ["".join("ACGT"[i] for i in row) for row in x0.tolist()]


def encode(*texts):
    return torch.tensor([["ACGT".index(base) for base in text] for text in texts])


def mismatches(text, motif, both_strands):
    """The mismatches at every position, on the better strand."""
    counts = []
    for start in range(len(text) - len(motif) + 1):
        window = text[start : start + len(motif)]
        strands = [window, window.translate(COMPLEMENT)[::-1]][: 1 + both_strands]
        pairs = (zip(strand, motif, strict=True) for strand in strands)
        counts.append(min(sum(base not in IUPAC[code] for base, code in pair) for pair in pairs))
    return counts


class TestConstraintContract(PotentialContract):
    def make_potential(self):
        return Constraint(lambda x0: (x0[..., :3] != 1).sum(-1), penalty=2.0)

    def make_sequences(self):
        return sequences(count=200, length=5)


class TestGCContract(PotentialContract):
    def make_potential(self):
        return GCContent(0.4, 0.6)

    def make_sequences(self):
        return sequences()


class TestForbiddenContract(PotentialContract):
    def make_potential(self):
        return ForbiddenMotif("GRN")

    def make_sequences(self):
        return sequences(length=8)


class TestRequiredContract(PotentialContract):
    def make_potential(self):
        return RequiredMotif("GANW", min_count=2)

    def make_sequences(self):
        return sequences()


def test_a_constraint_is_hard_and_its_lookahead_is_graded():
    constraint = Constraint(lambda x0: (x0 == 0).sum(-1), penalty=1.5)
    x0 = encode("CCC", "ACC", "AAA")
    assert constraint(x0).tolist() == [0.0, -math.inf, -math.inf]
    assert constraint.lookahead(x0).tolist() == [0.0, -1.5, -4.5]
    assert constraint.satisfied(x0).tolist() == [True, False, False]


def test_a_constraint_may_return_booleans():
    assert Constraint(lambda x0: x0[..., 0] == 0)(encode("AC", "CC")).tolist() == [-math.inf, 0.0]


def test_a_negative_violation_is_an_error():
    with pytest.raises(PotentialError, match="returned a negative violation, -1"):
        Constraint(lambda x0: -(x0 == 0).sum(-1).double())(encode("AC"))


def test_a_nan_violation_is_an_error():
    with pytest.raises(PotentialError, match="returned NaN"):
        Constraint(lambda x0: x0.sum(-1) * math.nan)(encode("AC"))


class TestGC:
    @pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 0.5), (0.35, 0.6), (0.0, 0.3)])
    def test_agrees_with_counting(self, low, high):
        x0 = sequences()
        shares = [sum(base in "GC" for base in text) / len(text) for text in strings(x0)]
        expected = [low - 1e-9 <= share <= high + 1e-9 for share in shares]
        assert GCContent(low, high).satisfied(x0).tolist() == expected

    def test_bounds_are_inclusive_in_spite_of_rounding(self):
        # 0.55 * 80 = 44.00000000000001 and 0.29 * 100 = 28.999999999999996
        for low, length in ((0.55, 80), (0.29, 100)):
            x0 = torch.zeros(1, length, dtype=torch.int64)
            x0[0, : round(low * length)] = 1
            assert GCContent(low, 1.0).satisfied(x0).all()
            assert GCContent(0.0, low).satisfied(x0).all()

    def test_the_violation_counts_bases(self):
        x0 = encode("AAAAAAAAAA", "GAAAAAAAAA", "GGCGAAAAAA", "GGCCGGCCGA")
        assert GCContent(0.2, 0.5).violation(x0).tolist() == [2.0, 1.0, 0.0, 4.0]

    def test_other_vocabularies(self):
        assert GCContent(0.5, 0.5, vocabulary="TGCA-").satisfied(torch.tensor([0, 1, 2, 4])).all()

    def test_a_vocabulary_without_g_is_an_error(self):
        with pytest.raises(ValueError, match="The vocabulary 'ACT' lacks 'G'"):
            GCContent(0.1, 0.2, vocabulary="ACT")

    @pytest.mark.parametrize("bounds", [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)])
    def test_bad_ranges_are_one_sentence(self, bounds):
        with pytest.raises(ValueError, match="GC range must satisfy"):
            GCContent(*bounds)

    def test_a_range_that_no_sequence_meets_is_an_error(self):
        with pytest.raises(PotentialError, match="allows no sequence of length 3"):
            GCContent(0.5, 0.5)(encode("ACG"))


@pytest.mark.parametrize("both_strands", [False, True])
@pytest.mark.parametrize("motif", ["GAC", "GNC", "TATAWAW", "RY", "B", "gaattc"])
class TestMotifs:
    def test_forbidden_counts_occurrences(self, motif, both_strands):
        x0 = sequences()
        expected = [
            sum(count == 0 for count in mismatches(text, motif.upper(), both_strands))
            for text in strings(x0)
        ]
        constraint = ForbiddenMotif(motif, both_strands=both_strands)
        assert constraint.violation(x0).tolist() == expected

    @pytest.mark.parametrize("min_count", [1, 3])
    def test_required_counts_mismatches(self, motif, both_strands, min_count):
        x0 = sequences()
        expected = [
            sum(sorted(mismatches(text, motif.upper(), both_strands))[:min_count])
            for text in strings(x0)
        ]
        constraint = RequiredMotif(motif, both_strands=both_strands, min_count=min_count)
        assert constraint.violation(x0).tolist() == expected


def test_every_iupac_code_matches_its_bases():
    for code, base in itertools.product(IUPAC, "ACGT"):
        found = not ForbiddenMotif(code, both_strands=False).satisfied(encode(base)).all()
        assert found == (base in IUPAC[code])


def test_a_short_sequence_holds_no_motif_but_cannot_hold_a_required_one():
    assert ForbiddenMotif("GAATTC")(encode("GAA")) == 0
    with pytest.raises(PotentialError, match="needs sequences of at least 6 tokens, got length 3"):
        RequiredMotif("GAATTC")(encode("GAA"))


def test_tokens_that_are_no_base_never_match():
    gap = ForbiddenMotif("NN", vocabulary="ACGT-")
    assert gap(torch.tensor([[0, 4, 1], [0, 1, 4]])).tolist() == [0.0, -math.inf]


def test_masked_positions_are_an_error():
    with pytest.raises(PotentialError, match="reads tokens 0 to 3, got 0 to 4"):
        ForbiddenMotif("GA")(torch.tensor([0, 4]))


@pytest.mark.parametrize("pattern", ["", "GAX", "G-A"])
def test_bad_patterns_are_one_sentence(pattern):
    with pytest.raises(ValueError, match="write it in IUPAC codes"):
        parse_iupac(pattern)


def test_bad_options_are_one_sentence():
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        RequiredMotif("GA", min_count=0)
    with pytest.raises(ValueError, match="penalty must be finite and >= 0, got nan"):
        ForbiddenMotif("GA", penalty=math.nan)
