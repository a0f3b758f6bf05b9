"""Motif files by what they mean: one motif gives one score in every format and every writing."""

import contextlib
import gzip
import re
import sys
from dataclasses import replace

import pytest
import torch

from ppl_diffusion.potentials import (
    MotifMatrix,
    find_motif,
    read_jaspar,
    read_meme,
    read_motifs,
)

COUNTS = [[5, 3, 2, 0], [1, 2, 3, 4], [0, 0, 10, 0]]  # positions by bases, ten sites each
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


def by_base(table, row="{base} {numbers}", *, order="ACGT"):
    columns = dict(zip("ACGT", zip(*table, strict=True), strict=True))
    numbers = {base: " ".join(map(str, columns[base])) for base in order}
    return "".join(row.format(base=b, numbers=n) + "\n" for b, n in numbers.items())


def by_position(table, row="{numbers}"):
    each = enumerate(table, 1)
    return "".join(row.format(k=k, numbers="\t".join(map(str, p))) + "\n" for k, p in each)


def shares(table):
    return [[number / sum(position) for number in position] for position in table]


def xml_of_meme(table):
    """The output of the program, whose sites have the counts of the table."""
    columns = [
        [base for base, n in zip("ACGT", position, strict=True) for _ in range(n)]
        for position in table
    ]
    sites = "".join(
        '<contributing_site sequence_id="s" position="0" strand="plus" pvalue="1"><site>'
        + "".join(f'<letter_ref letter_id="{base}"/>' for base in site)
        + "</site></contributing_site>"
        for site in zip(*columns, strict=True)
    )
    letters = "".join(f'<value letter_id="{base}">0.25</value>' for base in "ACGT")
    return (
        '<?xml version="1.0"?><MEME version="5"><training_set primary_sequences="x">'
        f"<letter_frequencies><alphabet_array>{letters}</alphabet_array></letter_frequencies>"
        '<sequence id="s" name="s"/></training_set><model><command_line>meme</command_line></model>'
        f'<motifs><motif id="M1" name="TBP" width="{len(table)}" sites="10" e_value="0">'
        f"<contributing_sites>{sites}</contributing_sites></motif></motifs></MEME>"
    )


def xms(table):
    names = ("adenine", "cytosine", "guanine", "thymine")
    columns = "".join(
        "<column>"
        + "".join(
            f'<weight symbol="{name}">{n}</weight>' for name, n in zip(names, position, strict=True)
        )
        + "</column>"
        for position in table
    )
    weights = f"<weightmatrix>{columns}</weightmatrix>"
    return f"<motifset><motif><name>TBP</name>{weights}</motif></motifset>"


def transfac(table):
    rows = by_position(table, "{k:02d}  {numbers}  N")
    return f"VV  1\nXX\n//\nAC  M1\nXX\nNA  TBP\nXX\nP0  A  C  G  T\n{rows}XX\n//\n"


def meme(table, header="nsites= 10"):
    rows = by_position(shares(table))
    return (
        "MEME version 5\n\nALPHABET= ACGT\n\nMOTIF M1 TBP\n"
        f"letter-probability matrix: alength= 4 w= {len(table)} {header}\n{rows}"
    )


FORMATS = {
    "JASPAR": lambda t: ">M1 TBP\n" + by_base(t, "{base}  [ {numbers} ]"),
    "JASPAR, tight": lambda t: ">M1\tTBP\n" + by_base(t, "{base}[{numbers}]"),
    "JASPAR 2010": lambda t: ">M1 TBP\n" + by_base(t, "{numbers}"),
    "JASPAR, one by one": lambda t: by_base(t, "{numbers}"),
    "hDPI": lambda t: by_base(t),
    "YeTFaSCo": lambda t: by_base(t, order="ATGC"),
    "ScerTF": lambda t: by_base(t, "{base} | {numbers}", order="ATCG"),
    "lower case": lambda t: ">M1 TBP\n" + by_base(t).lower(),
    "HOCOMOCO": lambda t: "> M1\tTBP\n" + by_position(t),
    "HOMER": lambda t: ">M1\tTBP\t6.05\t-1.7e+03\t0\n" + by_position(t),
    "Cluster-Buster": lambda t: ">M1 TBP\n# GAP 0\n" + by_position(t),
    "CIS-BP": lambda t: "Pos\tA\tC\tG\tT\n" + by_position(t, "{k}\t{numbers}"),
    "C2H2-ZFs": lambda t: "Gene G1\nMotif M1\nPos A C G T\n" + by_position(t, "{k} {numbers}"),
    "numbered": lambda t: ">M1 TBP\n" + by_position(t, "{k} {numbers}"),
    "Tiffin": lambda t: "G T A C\n" + by_position([[p[b] for b in (2, 3, 0, 1)] for p in t]),
    "TRANSFAC": transfac,
}
COUNTS_ONLY = {"MEME XML": xml_of_meme, "XMS": xms}


@pytest.fixture
def write(tmp_path):
    def _write(text, name="motifs.txt"):
        data = text if isinstance(text, bytes) else text.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        return path

    return _write


def scores(motif):
    x0 = torch.cartesian_prod(*[torch.arange(4)] * 5)
    return motif.potential()(x0)


class TestOneMotifInEveryFormat:
    """All sequences of five bases get the scores of the plain matrix."""

    @pytest.mark.parametrize("table", [COUNTS, [*COUNTS, [2, 2, 2, 4]], [*COUNTS, *COUNTS[:2]]])
    @pytest.mark.parametrize("layout", [*FORMATS, *COUNTS_ONLY])
    def test_counts(self, write, layout, table):
        (motif,) = read_motifs(write({**FORMATS, **COUNTS_ONLY}[layout](table)))
        expected = MotifMatrix.from_probabilities(shares(table), sites=10)
        assert motif.sites == 10
        torch.testing.assert_close(motif.potential().log_odds, expected.log_odds)

    @pytest.mark.parametrize("table", [COUNTS, [*COUNTS, [1, 1, 2, 6]], [*COUNTS, *COUNTS[:2]]])
    @pytest.mark.parametrize("layout", FORMATS)
    def test_probabilities_count_as_in_a_meme_file(self, write, layout, table):
        (expected,) = read_motifs(write(meme(table, ""), "m.meme"))
        (motif,) = read_motifs(write(FORMATS[layout](shares(table))))
        assert motif.sites == expected.sites == 20
        torch.testing.assert_close(scores(motif), scores(expected))

    def test_many_formats_have_many_meanings(self, write):
        """The guard of the tests above: another matrix has other scores."""
        (motif,), (other,) = (
            read_motifs(write(FORMATS["hDPI"](t))) for t in (COUNTS, [p[::-1] for p in COUNTS])
        )
        assert (scores(motif) != scores(other)).any()

    @pytest.mark.parametrize("layout", [*FORMATS, "MEME", *COUNTS_ONLY])
    @pytest.mark.parametrize(
        "rewrite",
        [
            lambda text: text.encode("utf-8-sig"),
            lambda text: text.encode("utf-16"),
            lambda text: text.replace("\n", "\r\n").encode(),
            lambda text: text.replace("\n", "\r").encode(),
            lambda text: text.replace("\n", "  \n\n").encode() + b"\n\n",
            lambda text: text.rstrip("\n").encode(),
            lambda text: gzip.compress(text.encode("utf-8-sig")),
            lambda text: text.replace("TBP", "T\xe9BP").encode("latin-1"),
        ],
    )
    def test_how_a_system_writes_text_does_not_matter(self, write, layout, rewrite):
        text = {**FORMATS, **COUNTS_ONLY, "MEME": meme}[layout](COUNTS)
        (motif,) = read_motifs(write(rewrite(text)))
        expected = MotifMatrix.from_probabilities(shares(COUNTS), sites=10)
        torch.testing.assert_close(motif.potential().log_odds, expected.log_odds)

    def test_a_table_of_four_by_four_is_turned_by_its_sums(self, write):
        table = [*COUNTS, [2, 2, 2, 4]]  # bases sum to 8, 7, 17, 8
        for layout in ("JASPAR 2010", "HOCOMOCO"):
            (motif,) = read_motifs(write(FORMATS[layout](table)))
            assert motif.probabilities.tolist() == shares(table)

    def test_two_decimals_are_what_they_round(self, write):
        rounded = "MOTIF R1\nletter-probability matrix: alength= 4 w= 2\n0.33 0.33 0.33 0.00\n"
        text = "MEME version 4\n\nALPHABET= ACGT\n\n" + rounded + "0.34 0.34 0.33 0.00\n"
        jaspar = ">R1\nA [.33 .34]\nC [.33 .34]\nG [.33 .33]\nT [0 0]\n"
        (a,), (b,) = read_motifs(write(text)), read_motifs(write(jaspar))
        torch.testing.assert_close(a.probabilities.sum(-1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(scores(a), scores(b))

    def test_small_probabilities_keep_their_digits(self, write):
        """Biopython would make whole sites of them, of which there are twenty."""
        text = MEME.replace("0.5 0.25 0.25 0", "0.991 0.004 0.003 0.002")
        assert read_motifs(write(text))[0].probabilities[0].tolist() == pytest.approx(
            [0.991, 0.004, 0.003, 0.002]
        )


class TestNames:
    @pytest.mark.parametrize(
        ("heading", "identifier", "name"),
        [
            (">MA0001.1 AGL3", "MA0001.1", "AGL3"),
            (">MA0001.1\tAGL3", "MA0001.1", "AGL3"),
            (">MA0001.1 TAL1::TCF3 (short form)", "MA0001.1", "TAL1::TCF3 (short form)"),
            (">MA0001.1", "MA0001.1", "MA0001.1"),
            ("> AHR_si ", "AHR_si", "AHR_si"),
            (">ATGACTC\tAP-1(bZIP)/Homer\t6.04\t-1.7e+03", "ATGACTC", "AP-1(bZIP)/Homer"),
            (">MA1 β-factor", "MA1", "β-factor"),
        ],
    )
    def test_headings_of_tables(self, write, heading, identifier, name):
        (motif,) = read_motifs(write(f"{heading}\n{by_base(COUNTS)}"))
        assert (motif.identifier, motif.name) == (identifier, name)
        assert find_motif([motif], name) is motif

    @pytest.mark.parametrize(
        ("heading", "identifier", "name"),
        [
            ("MOTIF MA1 long name", "MA1", "long name"),
            ("MOTIF MA1", "MA1", "MA1"),
            ("MOTIF GSKGC MEME-1\twidth =   2  sites =  10", "GSKGC", "MEME-1"),
        ],
    )
    def test_headings_of_meme(self, write, heading, identifier, name):
        first = read_motifs(write(MEME.replace("MOTIF MA0001.1 FIRST", heading)))[0]
        assert (first.identifier, first.name) == (identifier, name)

    def test_names_in_other_formats(self, write):
        (motif,) = read_motifs(write(transfac(COUNTS)))
        assert (motif.identifier, motif.name) == ("M1", "TBP")
        (motif,) = read_motifs(write(FORMATS["C2H2-ZFs"](COUNTS)))
        assert (motif.identifier, motif.name) == ("M1", "G1")
        (motif,) = read_motifs(write(FORMATS["CIS-BP"](COUNTS), "M0123_2.txt"))
        assert (motif.identifier, motif.name) == ("M0123_2", "M0123_2")
        (motif,) = read_motifs(write(xml_of_meme(COUNTS)))
        assert (motif.identifier, motif.name) == ("M1", "TBP")

    @pytest.mark.parametrize("name", ["FIRST", "first", "MA0001.1"])
    def test_motifs_are_found_by_name_or_identifier(self, write, name):
        assert find_motif(read_motifs(write(MEME)), name).identifier == "MA0001.1"

    def test_names_that_are_not_there_or_not_unique(self, write):
        motifs = read_motifs(write(MEME))
        with pytest.raises(ValueError, match="No motif is called 'TBP': the file holds 2, such as"):
            find_motif(motifs, "TBP")
        twin = replace(motifs[0], identifier="MA0001.2")
        with pytest.raises(ValueError, match=r"'FIRST': give one of the .* MA0001.1, MA0001.2"):
            find_motif([motifs[0], twin], "FIRST")
        with pytest.raises(ValueError, match=r"2 motifs are called 'MA0001\.1', and some share an"):
            find_motif([motifs[0], motifs[0]], "MA0001.1")


class TestWholeFiles:
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

    def test_transfac(self, write):
        two = transfac(COUNTS) + transfac(COUNTS[:2]).replace("M1", "M2").partition("//\n")[2]
        assert [len(m.probabilities) for m in read_motifs(write(two))] == [3, 2]

    def test_a_motif_becomes_a_potential(self, write):
        motif = read_motifs(write(JASPAR))[1].potential(pseudocount=0.5, both_strands=False)
        expected = MotifMatrix.from_probabilities(
            [[1, 0, 0, 0], [0, 1, 0, 0], [0.25] * 4], sites=8 / 3, pseudocount=0.5
        )
        torch.testing.assert_close(motif.log_odds, expected.log_odds)
        assert (motif.name, motif.both_strands) == ("motif MA0003.1", False)

    def test_biopython_is_imported_when_a_table_is_read(self, write, monkeypatch):
        monkeypatch.setitem(sys.modules, "Bio", None)
        assert len(read_motifs(write(MEME))) == 2
        with pytest.raises(ImportError):
            read_motifs(write(JASPAR))


MEME_DAMAGE = [
    (("w= 2", "w= 3"), r"line 14 \('URL.*has 2 rows of probabilities, not 3"),
    (("0.5 0.25 0.25 0", "0.5 0.25 0.25 0.2"), r"line 12 .*sum to one"),
    (("0.5 0.25 0.25 0", "0.5 0.25 0.25"), r"line 12 .*4 probabilities"),
    (("0.5 0.25 0.25 0", "0.5 0.25 nan 0"), r"line 12 .*only finite numbers"),
    (("0.5 0.25 0.25 0", "1.5 -0.5 0 0"), r"line 12 .*4 probabilities"),
    (("0.5 0.25 0.25 0", "nan 0.25 0.25 0"), r"line 12 .*has 0 rows"),
    (("MOTIF MA0001.1 FIRST", "MOTIF"), r"line 11 .*must come before the matrix"),
    (("nsites= 10", "nsites= 1e999"), r"line 11 .*nsites must be a number of sites"),
    (("w= 2", "w= 1e999"), r"has 2 rows of probabilities, not inf"),
    (("letter-probability", "log-odds"), r"'MOTIF MA0001.1 FIRST' at line 10 .*no letter-prob"),
]
JASPAR_DAMAGE = [
    (("C  [ 3 2 ]", "G  [ 3 2 ]"), r"line 4 .*one line of numbers for each of A, C, G, T"),
    (("C  [ 3 2 ]", "N  [ 3 2 ]"), r"line 3 .*one line of numbers for each of A, C, G, T"),
    (("C  [ 3 2 ]\n", ""), r"numbers of T were expected below"),
    (("C  [ 3 2 ]", "C  [ 3 2 1 ]"), r"line 3 .*equally many numbers"),
    (("C  [ 3 2 ]", "C  [ ]"), r"line 3 .*equally many numbers"),
    (("C  [ 3 2 ]", "C  [ 3 -2 ]"), r"'>MA0001.1 FIRST' at line 5 .*not be negative"),
    (("C  [ 3 2 ]", "C  [ 3 x ]"), r"line 3 .*only finite numbers"),
    (("T  [ 0 4 ]", "T  [ 0 1e999 ]"), r"numbers of MA0001.1 are too large"),
    (("A  [ 5 1 ]\nC  [ 3 2 ]", "A [ 1e308 1 ]\nC [ 1e308 2 ]"), r"MA0001.1 are too large"),
    (("C  [ 3 2 ]", "C  [ 3 nan ]"), r"line 3 .*only finite numbers"),
    (("1\n0 2 1\n0 0 1\n0 0 1", "0\n0 2 0\n0 0 0\n0 0 0"), "every position of MA0003.1 must have"),
    (("2 0 1\n0 2 1\n0 0 1\n0 0 1", ".4 .4\n.1 .1\n.2 .2\n.2 .2"), "no probabilities that sum to"),
    (("\n0 0 1\n0 0 1\n", "\n0 0 1\n"), "numbers of T were expected"),
    (("2 0 1\n", "2 0 1 3 4\n"), "equally many numbers"),
    (("2 0 1\n0 2 1\n0 0 1\n0 0 1\n", ""), "'>MA0003.1' at line 7 .* were expected below"),
    (("2 0 1\n0 2 1\n0 0 1\n0 0 1\n", "GATTACA\n"), "the bases must be A, C, G, T"),
    (("2 0 1\n0 2 1\n0 0 1\n0 0 1\n", "9 1 1 1 2\n" * 3), "four numbers were expected"),
    ((">MA0003.1", ">"), "'>' must be followed by an identifier"),
]
DAMAGED = [*((MEME, *d) for d in MEME_DAMAGE), *((JASPAR, *d) for d in JASPAR_DAMAGE)]

PAGE = "<html><body>not found</body></html>"


class TestDamage:
    @pytest.mark.parametrize(("whole", "damage", "text"), DAMAGED)
    def test_an_entry_spoils_itself_and_is_named(self, write, whole, damage, text):
        intact = {m.identifier: scores(m) for m in read_motifs(write(whole))}
        with pytest.warns(UserWarning, match="has 2 motifs, of which 1 are damaged") as caught:
            (left,) = read_motifs(write(whole.replace(*damage, 1)))
        torch.testing.assert_close(scores(left), intact[left.identifier])
        (one,) = caught
        assert one.filename == __file__
        assert re.search(text, str(one.message)), str(one.message)

    def test_a_damaged_transfac_entry(self, write):
        two = transfac(COUNTS) + transfac(COUNTS[:2]).replace("M1", "M2").partition("//\n")[2]
        with pytest.warns(UserWarning, match="'AC  M1' at .*Biopython cannot read it"):
            (left,) = read_motifs(write(two.replace("02  1", "03  1", 1)))
        assert left.identifier == "M2"

    def test_a_damaged_motif_in_xml(self, write):
        one, none = xms(COUNTS), xms([[0] * 4]).replace("TBP", "VOID")
        two = one.replace("</motifset>", none.removeprefix("<motifset>"))
        with pytest.warns(UserWarning, match="'VOID' at .*every position of VOID must have counts"):
            (left,) = read_motifs(write(two))
        assert left.name == "TBP"

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("\n \n", "is empty"),
            ("", "is empty"),
            (b"\xef\xbb\xbf", "is empty"),
            ("version 4\n", "begins with 'version 4': give a MEME file"),
            ("MEME version 4\n\nALPHABET= ACGT\n", "no letter-probability matrix was found"),
            (MEME.replace("ACGT", "ACGU"), r"line 3 .*alphabet must be ACGT, not 'ACGU'"),
            (MEME.replace("ACGT", "ACDEFGHIKLMNPQRSTVWY"), r"alphabet must be ACGT"),
            (
                ">M1\nA [ 1 x ]\nC [ 1 1 ]\nG [ 1 1 ]\nT [ 1 1 ]\n",
                r"damaged at line 2 .*only finite",
            ),
            (">seq\nACGTACGT\n", "the bases must be A, C, G, T"),
            (b"\x00\x01\x02", "not plain or gzipped text"),
            (PAGE, "web page, and is no output of MEME and no XMS file: give"),
            (
                "<!DOCTYPE html>\n" + PAGE,
                "web page, and is no output of MEME and no XMS file: give",
            ),
            ("Pos\tA\tC\tG\tT\n", r"line 1 .*numbers were expected below"),
            ("A C G T\n", r"line 1 .*numbers were expected below"),
            (">M1\nA C G T\n", r"line 2 .*numbers were expected below"),
            ("A [ 1 2 ]\nC [ 1 2 ]\nG [ 1 2 ]\nU [ 1 2 ]\n", "each of A, C, G, T was expected"),
        ],
    )
    def test_a_file_without_one_motif_is_one_sentence(self, write, text, sentence):
        with pytest.raises(ValueError, match=sentence) as caught:
            read_motifs(write(text))
        assert "\n" not in str(caught.value)

    def test_the_wrong_format_is_refused(self, write):
        with pytest.raises(ValueError, match="a MEME file begins with"):
            read_meme(write(JASPAR))
        with pytest.raises(ValueError, match="a JASPAR matrix begins with"):
            read_jaspar(write(MEME))

    def test_files_that_cannot_be_read(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_motifs(tmp_path / "absent.meme")
        with pytest.raises(IsADirectoryError, match="is a folder: give one of its files"):
            read_motifs(tmp_path)
        broken = tmp_path / "broken.gz"
        broken.write_bytes(gzip.compress(MEME.encode())[:-20])
        with pytest.raises(ValueError, match="not plain or gzipped text"):
            read_motifs(broken)

    @pytest.mark.parametrize("whole", [MEME, JASPAR, transfac(COUNTS), meme(COUNTS)])
    def test_no_cut_ends_in_another_error(self, write, whole, monkeypatch):
        """A file cut off anywhere is read, warned about, or refused in one sentence."""
        monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
        for end in range(0, len(whole), 7):
            path = write(whole[:end])
            refused = pytest.raises(ValueError, match=r"^The motif file")
            with contextlib.suppress(pytest.fail.Exception), refused:
                read_motifs(path)
