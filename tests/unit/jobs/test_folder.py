import pytest

from ppl_diffusion.designs.question import InputError
from ppl_diffusion.jobs.folder import check_target, whole_folder, write_whole


def fill(folder, text="{}"):
    with whole_folder(folder, replace=True) as scratch:
        (scratch / "summary.json").write_text(text)


def fail_halfway(folder):
    with whole_folder(folder, replace=True) as scratch:
        (scratch / "summary.json").write_text("{}")
        raise RuntimeError("halfway")


def test_a_folder_appears_whole(tmp_path):
    fill(tmp_path / "a" / "run")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run"]
    assert (tmp_path / "a" / "run" / "summary.json").read_text() == "{}"


def test_a_failing_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_failing_block_keeps_the_earlier_run(tmp_path):
    fill(tmp_path / "run", "first")
    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_replacing_leaves_only_the_new_run(tmp_path):
    fill(tmp_path / "run", "first")
    (tmp_path / "run" / "more.txt").write_text("old")
    fill(tmp_path / "run", "second")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["summary.json"]
    assert (tmp_path / "run" / "summary.json").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    check_target(tmp_path / "run", replace=False)


def test_refusals_name_the_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a folder: choose another --out"):
        check_target(tmp_path / "file", replace=True)
    with pytest.raises(InputError, match="is not a writable folder"):
        check_target(tmp_path / "file" / "run", replace=True)
    fill(tmp_path / "run")
    with pytest.raises(InputError, match="replace it with --force"):
        check_target(tmp_path / "run", replace=False)


def test_other_peoples_files_are_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="holds files that are no run"):
        check_target(tmp_path / "home", replace=True)


def test_write_whole(tmp_path):
    write_whole(tmp_path / "a" / "b.txt", "text")
    assert (tmp_path / "a" / "b.txt").read_text() == "text"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]
    with pytest.raises(InputError, match="give the name of a file"):
        write_whole(tmp_path / "a", "text")
