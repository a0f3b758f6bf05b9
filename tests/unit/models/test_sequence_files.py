"""Sequence files of every kind, and what is said of damaged ones."""

import gzip

import pytest

from ppl_diffusion.models.sequence_files import Columns, is_sequence_file, read_rows

PACKED = [False, True]


def written(folder, name, text, packed=False):
    content = text if isinstance(text, bytes) else text.encode()
    path = folder / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def refusal(path, **columns):
    with pytest.raises(ValueError, match="file") as error:
        read_rows(path, Columns(**columns))
    return str(error.value).replace(str(path.parent) + "/", "")


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["fa", "fasta", "fna", "FAA"])
def test_fasta(tmp_path, ending, end, packed):
    text = end.join([">one first", "acgt", "ACG ", "", ">two", "NNN", ""])
    rows = read_rows(written(tmp_path, f"own.{ending}", text, packed))
    assert rows.texts == ("acgtACG", "NNN")
    assert rows.lines == (1, 5)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("ending", "mark"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, ending, mark, end, packed):
    lines = [["id", "word", "kind", "mass", "split"], ["1", "ab", "x", "2", "train"]]
    lines += [["2", "c", "y", "0.5", "test"], ["3", "dd", "x", "1e1", "valid"]]
    text = "\ufeff" + end.join(mark.join(line) for line in lines) + end
    path = written(tmp_path, f"own.{ending}", text, packed)
    rows = read_rows(path, Columns("word", "kind", "mass", "split"))
    assert rows.texts == ("ab", "c", "dd")
    assert rows.lines == (2, 3, 4)
    assert rows.labels == ("x", "y", "x")
    assert rows.weights == (2.0, 0.5, 10.0)
    assert rows.parts == ("train", "test", "valid")
    assert rows.source == path.name


def test_some_rows(tmp_path):
    text = "word,kind\na,x\nb,y\nc,z\n"
    rows = read_rows(written(tmp_path, "own.csv", text), Columns("word", "kind")).taken([2, 0])
    assert (rows.texts, rows.labels, rows.lines, rows.weights) == (
        ("c", "a"),
        ("z", "x"),
        (4, 2),
        None,
    )


@pytest.mark.parametrize("title", ["anything\nab\n", "id,Sequence\n1,ab\n", "id,smiles\n1,ab\n"])
def test_the_column_that_is_meant(tmp_path, title):
    assert read_rows(written(tmp_path, "own.csv", title)).texts == ("ab",)


def test_cells_of_several_lines(tmp_path):
    rows = read_rows(written(tmp_path, "own.csv", 'text\n"a\nb"\nc\n'))
    assert (rows.texts, rows.lines) == (("a\nb", "c"), (2, 4))


@pytest.mark.parametrize("packed", PACKED)
def test_lines_and_smiles_files(tmp_path, packed):
    text = "CC O one\r\n\r\nN two\r\n"
    assert read_rows(written(tmp_path, "own.txt", text, packed)).texts == ("CC O one", "N two")
    assert read_rows(written(tmp_path, "own.smi", text, packed)).texts == ("CC", "N")


def test_names_of_sequence_files():
    assert all(map(is_sequence_file, ("a.fa", "b.csv.gz", "c/d.SMI", "e.txt")))
    assert not any(map(is_sequence_file, ("yeast-promoter", "a.npz", "b.gz", "csv")))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("own.fa", "ACGT\n>one\nA\n", "is no FASTA: line 1 stands before the first title; begin "
         "every sequence with a line >title."),
        ("own.fa", ">one\n>two\nA\n", "has a title without a sequence on line 1."),
        ("own.txt", "\n\n", "holds no sequences; give one that does."),
        ("own.fa", "", "holds no sequences; give one that does."),
        ("own.csv", "sequence\n", "holds no sequences; give one that does."),
        ("own.csv", "", "holds no sequences; give one that does."),
        ("own.csv", "a,b\n1,2\n", "has the columns a, b: say by --column which one holds the "
         "sequences."),
        ("own.csv", "sequence,b\nA,2\nC\n", "has 1 cells on line 3, but 2 column titles; mend the "
         "line."),
        ("own.csv", "sequence,b\n,2\n", "has no sequence on line 2; mend the line."),
        ("own.txt", b"ab\n\xff\n", "is no UTF-8 text: see line 2."),
        ("own.txt.gz", b"ab\n", "is damaged: it cannot be unpacked."),
        ("own.npz", "ab\n", "is of no known kind: end its name in one of .fa, .fasta, .fna, .faa, "
         ".ffn, .csv, .tsv, .txt, .seq, .smi, .smiles, or these and .gz."),
    ],
)  # fmt: skip
def test_what_is_said_of_files(tmp_path, name, text, said):
    assert refusal(written(tmp_path, name, text)) == f"The file {name!r} {said}"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": "d"}, "has no column 'd': choose one of a, kind, mass, part, gap for --column."),
        ({"text": "a", "label": "class"}, "has no column 'class': choose one of a, kind, mass, "
         "part, gap for --label-column."),
        ({"text": "a", "label": "gap"}, "has no class on line 3; mend the line."),
        ({"text": "a", "weight": "mass"}, "has the weight '-1' on line 3; give a number from 0 "
         "up."),
        ({"text": "a", "weight": "kind"}, "has the weight 'x' on line 2; give a number from 0 up."),
        ({"text": "a", "part": "part"}, "has the part 'dev' on line 3; write train, valid or "
         "test."),
    ],
)  # fmt: skip
def test_what_is_said_of_columns(tmp_path, columns, said):
    path = written(tmp_path, "own.csv", "a,kind,mass,part,gap\nA,x,1,train,z\nC,y,-1,dev,\n")
    assert refusal(path, **columns) == f"The file 'own.csv' {said}"


def test_columns_of_a_file_without(tmp_path):
    said = refusal(written(tmp_path, "own.fa", ">a\nA\n"), label="kind")
    assert said == "The file 'own.fa' has no columns: leave --label-column out."


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^There is no file '.*own.fa': check its name\.$"):
        read_rows(tmp_path / "own.fa")


def test_a_packed_file_cut_short(tmp_path):
    path = written(tmp_path, "own.txt", "abc\n" * 1000, packed=True)
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(path) == "The file 'own.txt.gz' is damaged: it cannot be unpacked."
