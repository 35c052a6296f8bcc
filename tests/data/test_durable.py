"""Writing files and folders so that they are whole under their names."""

import os

import pytest

from data.storage.durable import publish, write_atomically


def test_contents_are_synced_before_a_file_has_its_name_and_the_name_after(tmp_path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(sorted(path.name for path in tmp_path.iterdir())))
    write_atomically(tmp_path / "file", [b"a", b"b"])
    assert (synced, (tmp_path / "file").read_bytes()) == ([[".file.partial"], ["file"]], b"ab")


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
