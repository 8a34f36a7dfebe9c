"""What cannot be written to is reported before the work."""

import errno
import tempfile
from pathlib import Path

import pytest

from bigdet.evaluation.saved import SavedResults
from bigdet.host.files import check_file, check_folder, write_text


def test_a_folder_is_made_and_left_empty(tmp_path: Path):
    check_folder(tmp_path / "a/b", "--out")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a/b"]
    check_file(tmp_path / "c/x.json", "--out")
    assert list((tmp_path / "c").iterdir()) == []


def test_what_counts_by_being_there_is_on_the_disk_before_it_is_there(
    tmp_path: Path, disk_calls: list[str]
):
    folder = tmp_path / "evaluation"
    write_text(folder / "x-1.json", "{}")
    SavedResults().write(folder / "x-1.detections")
    assert disk_calls == [
        "sync x-1.json.tmp",
        "name x-1.json",
        "sync evaluation",
        "sync x-1.detections.tmp",
        "name x-1.detections",
        "sync evaluation",
    ]


def test_where_nothing_can_be_written_is_reported_with_the_option(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for folder, said in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/below", "cannot be written to: Not a directory"),
        (Path("/proc/nothing"), "cannot be written to: No such file or directory"),
    ]:
        with pytest.raises(
            ValueError, match=rf"^--out: {folder}: {said}\. Give a folder to write to\.$"
        ):
            check_folder(folder, "--out")
    with pytest.raises(ValueError, match=r"^--out: .* is a folder\. Give the name of a file\.$"):
        check_file(tmp_path, "--out")
    with pytest.raises(ValueError, match=r"^--out: .*/file: is a file"):
        check_file(tmp_path / "file/x.json", "--out")


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(dir: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"^output: .* cannot be written to: No space left on dev"):
        check_folder(tmp_path, "output")
