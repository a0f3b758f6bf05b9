"""Motif matrices against plain Python, and their files."""

import gzip
import math
from itertools import chain

import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import (
    MotifMatrix,
    find_motif,
    read_jaspar,
    read_meme,
    read_motifs,
)
from ppl_diffusion.testing.potential_contract import PotentialContract

WIDTH = 5
MEME = """MEME version 4

ALPHABET= ACGT

strands: + -

Background letter frequencies
A 0.25 C 0.25 G 0.25 T 0.25

MOTIF MA0001.1 FIRST
letter-probability matrix: alength= 4 w= 2 nsites= 10 E= 0
0.5 0.25 0.25 0
 1e-1 .2 0.3 0.4
URL http://example.org

MOTIF MA0002.1
letter-probability matrix: alength= 4 w= 1
0 0 0 1
"""
JASPAR = """>MA0001.1 FIRST
A  [ 5 1 ]
C  [ 3 2 ]
G  [ 2 3 ]
T  [ 0 4 ]

>MA0003.1
2 0 1
0 2 1
0 0 1
0 0 1
"""


def sequences(count=50, length=14, seed=0):
    return torch.randint(4, (count, length), generator=torch.Generator().manual_seed(seed))


def log_odds(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, 4, generator=generator, dtype=torch.float64)


def plain_scores(row, matrix, both_strands):
    """All scores of one sequence, strand by strand, by definition."""
    windows = [row[i : i + WIDTH] for i in range(len(row) - WIDTH + 1)]
    reverse = [[3 - base for base in reversed(window)] for window in windows]
    strands = [windows, reverse][: 1 + both_strands]
    return [
        [sum(float(matrix[i][b]) for i, b in enumerate(window)) for window in strand]
        for strand in strands
    ]


class TestBestHitContract(PotentialContract):
    tolerance = 1e-12

    def make_potential(self):
        return MotifMatrix(log_odds())

    def make_sequences(self):
        return sequences()


class TestAverageContract(TestBestHitContract):
    def make_potential(self):
        return MotifMatrix(log_odds(), reduce="logmeanexp", both_strands=False)


@pytest.mark.parametrize("both_strands", [False, True])
class TestScan:
    def test_scores_by_definition(self, both_strands):
        x0, matrix = sequences(), log_odds()
        expected = [plain_scores(row, matrix, both_strands) for row in x0.tolist()]
        actual = MotifMatrix(matrix, both_strands=both_strands).scores(x0)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))

    def test_reductions_by_definition(self, both_strands):
        x0, matrix = sequences(), log_odds()
        flat = [[*chain(*plain_scores(row, matrix, both_strands))] for row in x0.tolist()]
        best = torch.tensor([max(scores) for scores in flat], dtype=torch.float64)
        average = [math.log(sum(map(math.exp, scores)) / len(scores)) for scores in flat]
        averaged = MotifMatrix(matrix, both_strands=both_strands, reduce="logmeanexp")
        torch.testing.assert_close(MotifMatrix(matrix, both_strands=both_strands)(x0), best)
        torch.testing.assert_close(averaged(x0), torch.tensor(average, dtype=torch.float64))


def test_the_reverse_complement_scores_the_same_on_both_strands():
    x0 = sequences()
    motif = MotifMatrix(log_odds())
    torch.testing.assert_close(motif(x0), motif((3 - x0).flip(-1)))


def test_the_best_hit_is_where_the_motif_was_put():
    matrix = torch.full((3, 4), -1.0)
    matrix[0, 2] = matrix[1, 0] = matrix[2, 1] = 1.0  # GAC; on the other strand GTC
    x0 = torch.tensor([[0, 0, 2, 0, 1, 0], [2, 3, 1, 0, 0, 0]])
    score, position, strand = MotifMatrix(matrix).best_hit(x0)
    assert (score.tolist(), position.tolist(), strand.tolist()) == ([3, 3], [2, 0], [0, 1])


def test_the_average_of_exact_odds_is_one_under_the_background():
    # E_background[mean odds] = 1: the one-occurrence model is normalised (all 4^5 sequences).
    p = log_odds().softmax(-1)
    motif = MotifMatrix.from_probabilities(p, pseudocount=1e-9, reduce="logmeanexp")
    x0 = torch.cartesian_prod(*[torch.arange(4)] * 6)
    assert motif(x0).exp().mean() == pytest.approx(1.0, abs=1e-6)


def test_pseudo_counts_follow_the_formula():
    background = (0.3, 0.2, 0.2, 0.3)
    motif = MotifMatrix.from_probabilities(
        [[1, 0, 0, 0]], sites=9, pseudocount=1, background=background
    )
    b = torch.tensor(background, dtype=torch.float64)
    smoothed = (9 * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64) + b) / 10
    torch.testing.assert_close(motif.log_odds[0], (smoothed / b).log())


def test_other_vocabularies_are_translated():
    x0, matrix = sequences(), log_odds()
    order = torch.tensor(["TG-CA".index(base) for base in "ACGT"])
    translated = MotifMatrix(matrix, vocabulary="TG-CA")
    torch.testing.assert_close(translated(order[x0]), MotifMatrix(matrix)(x0))
    gap = torch.full((WIDTH,), 2)
    assert translated(gap) == pytest.approx(WIDTH * float(matrix.min()))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: MotifMatrix(torch.zeros(3, 5)), "one row of 4 numbers"),
        (lambda: MotifMatrix(torch.zeros(0, 4)), "one row of 4 numbers"),
        (lambda: MotifMatrix([[0, 0, 0, -math.inf]]), "the matrix must be finite"),
        (lambda: MotifMatrix(torch.zeros(3, 4), reduce="sum"), 'reduce is "max" or "logmeanexp"'),
        (lambda: MotifMatrix.from_probabilities([[0.5, 0.5, 0.5, 0]]), "row 0 sums to 1.5"),
        (lambda: MotifMatrix.from_probabilities([[1.5, -0.5, 0, 0]]), "probabilities"),
        (lambda: MotifMatrix.from_probabilities([[1, 0, 0, 0]], pseudocount=0), "must be positive"),
        (lambda: MotifMatrix.from_probabilities([[1, 0, 0, 0]], background=(1, 0, 0, 0)), "backg"),
    ],
)
def test_bad_matrices_are_one_sentence(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_sequences_shorter_than_the_motif_are_an_error():
    with pytest.raises(PotentialError, match="needs sequences of at least 5 tokens, got length 4"):
        MotifMatrix(log_odds())(torch.zeros(4, dtype=torch.int64))


@pytest.fixture
def write(tmp_path):
    def _write(text, name="motifs.txt"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        return path

    return _write


class TestFiles:
    @pytest.mark.parametrize("name", ["motifs.meme", "motifs.meme.gz", "compressed.txt.gz"])
    @pytest.mark.parametrize("read", [read_meme, read_motifs])
    def test_meme(self, write, name, read):
        first, second = read(write(MEME, name))
        assert (first.identifier, first.name, first.sites) == ("MA0001.1", "FIRST", 10)
        expected = [[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]]
        assert first.probabilities.tolist() == expected
        assert (second.identifier, second.name, second.sites) == ("MA0002.1", "MA0002.1", 20)

    @pytest.mark.parametrize("read", [read_jaspar, read_motifs])
    def test_jaspar(self, write, read):
        first, second = read(write(JASPAR))
        assert first.probabilities.tolist() == [[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]]
        assert (first.name, first.sites) == ("FIRST", 10)
        assert second.probabilities[:2].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
        assert second.sites == pytest.approx(8 / 3)

    def test_a_motif_becomes_a_potential(self, write):
        motif = read_motifs(write(JASPAR))[1].potential(pseudocount=0.5, both_strands=False)
        expected = MotifMatrix.from_probabilities(
            [[1, 0, 0, 0], [0, 1, 0, 0], [0.25] * 4], sites=8 / 3, pseudocount=0.5
        )
        torch.testing.assert_close(motif.log_odds, expected.log_odds)
        assert (motif.name, motif.both_strands) == ("motif MA0003.1", False)

    @pytest.mark.parametrize("name", ["FIRST", "first", "MA0001.1"])
    def test_motifs_are_found_by_name_or_identifier(self, write, name):
        assert find_motif(read_motifs(write(MEME)), name).identifier == "MA0001.1"

    def test_names_that_are_not_there_or_not_unique(self, write):
        motifs = read_motifs(write(MEME))
        with pytest.raises(ValueError, match="No motif is called 'TBP': the file holds 2, such as"):
            find_motif(motifs, "TBP")
        with pytest.raises(ValueError, match="2 motifs are called 'FIRST': give one of"):
            find_motif([motifs[0], motifs[0]], "FIRST")

    @pytest.mark.parametrize(
        ("damage", "text"),
        [
            (("w= 2", "w= 3"), r"line 14 \('URL.*has 2 rows of probabilities, not 3"),
            (("0.5 0.25 0.25 0", "0.5 0.25 0.25 0.2"), r"line 12 .*sum to one"),
            (("0.5 0.25 0.25 0", "0.5 0.25 0.25"), r"line 12 .*4 probabilities"),
            (("0.5 0.25 0.25 0", "0.5 0.25 nan 0"), r"line 12 .*only finite numbers"),
            (("0.5 0.25 0.25 0", "1.5 -0.5 0 0"), r"line 12 .*4 probabilities"),
            (("ALPHABET= ACGT", "ALPHABET= ACGU"), r"line 3 .*alphabet must be ACGT"),
            (("MOTIF MA0001.1 FIRST", "MOTIF"), r"line 11 .*must come before the matrix"),
            (("MEME version 4", "version 4"), "begins with 'version 4': give a MEME file"),
        ],
    )
    def test_damaged_meme_files_name_the_line(self, write, damage, text):
        with pytest.raises(ValueError, match=text):
            read_motifs(write(MEME.replace(*damage, 1)))

    @pytest.mark.parametrize(
        ("damage", "text"),
        [
            (("C  [ 3 2 ]", "G  [ 3 2 ]"), r"line 3 .*counts of C were expected"),
            (("C  [ 3 2 ]", "C  [ 3 2 1 ]"), r"line 5 .*equally many counts"),
            (("C  [ 3 2 ]", "C  [ 3 -2 ]"), r"line 3 .*not be negative"),
            (("C  [ 3 2 ]", "C  [ 3 x ]"), r"line 3 .*only finite numbers"),
            (("1\n0 2 1\n0 0 1\n0 0 1", "0\n0 2 0\n0 0 0\n0 0 0"), "every position .* have counts"),
            (("\n0 0 1\n0 0 1\n", "\n0 0 1\n"), "counts of T were expected"),
            ((">MA0003.1", ">"), "'>' must be followed by an identifier"),
        ],
    )
    def test_damaged_jaspar_files_name_the_line(self, write, damage, text):
        with pytest.raises(ValueError, match=text):
            read_motifs(write(JASPAR.replace(*damage, 1)))

    def test_the_wrong_format_is_refused(self, write):
        with pytest.raises(ValueError, match="a MEME file begins with"):
            read_meme(write(JASPAR))
        with pytest.raises(ValueError, match="a JASPAR matrix begins with"):
            read_jaspar(write(MEME))

    def test_files_that_cannot_be_read(self, write, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_motifs(tmp_path / "absent.meme")
        with pytest.raises(ValueError, match="is empty"):
            read_motifs(write("\n \n"))
        broken = tmp_path / "broken.gz"
        broken.write_bytes(gzip.compress(MEME.encode())[:-20])
        with pytest.raises(ValueError, match="not plain or gzipped text"):
            read_motifs(broken)

    def test_a_meme_file_without_matrices_is_an_error(self, write):
        with pytest.raises(ValueError, match="no letter-probability matrix was found"):
            read_motifs(write("MEME version 4\n\nALPHABET= ACGT\n"))
