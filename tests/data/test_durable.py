"""Writing files and folders so that they are whole under their names."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.storage.durable import PARTIAL, publish, remove_partials, write_atomically


def test_contents_are_synced_before_a_file_has_its_name_and_the_name_after(tmp_path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(sorted(path.name for path in tmp_path.iterdir())))
    write_atomically(tmp_path / "file", [b"a", b"b"])
    ((partial,), after), content = synced, (tmp_path / "file").read_bytes()
    assert PARTIAL.fullmatch(partial) and (after, content) == (["file"], b"ab")


def test_writers_of_the_same_file_meet_no_others_and_leave_nothing_half_written(tmp_path) -> None:
    def write(number: int) -> None:
        def chunks() -> Iterator[bytes]:
            yield b"%d" % number
            barrier.wait()  # all are half-written
            yield b"%d" % number

        write_atomically(tmp_path / "file", chunks())

    barrier = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert (tmp_path / "file").read_bytes() in (b"00", b"11", b"22") and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "file", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_killed_writers_left_is_removed_once_it_is_old_and_nothing_else_is(tmp_path) -> None:
    left = [".a.json.00c0ffee.partial", ".b.00c0ffef.partial"]
    kept = [".mine.partial", "a.json", "c.00c0ffee.partial"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
        if name != left[1]:
            os.utime(tmp_path / name, (0, 0))
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([left[1], *kept])


@pytest.mark.parametrize("left", [False, True], ids=["first", "after a crash"])
def test_a_published_folder_replaces_another_and_its_name_is_synced(tmp_path, monkeypatch, left: bool) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "final" / "file").read_text()))
    for name in ("partial", "final", *([".final.replaced"] if left else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish(tmp_path / "partial", tmp_path / "final")
    assert (synced, [path.name for path in tmp_path.iterdir()]) == (["partial"], ["final"])


@pytest.mark.parametrize("stranger", ["file", "link"])
def test_a_published_folder_takes_the_place_of_a_strangers_file_or_link(tmp_path, stranger: str) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "file").write_text("ours")
    if stranger == "file":
        (tmp_path / "final").write_text("theirs")
    else:
        (tmp_path / "final").symlink_to("nowhere")
    publish(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "ours" and len(list(tmp_path.iterdir())) == 1
