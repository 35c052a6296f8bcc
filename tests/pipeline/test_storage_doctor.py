"""What the doctor reports of real folders and packed datasets, good and bad, and that it leaves nothing behind."""

from pathlib import Path

import pytest

from pipeline.config.parsing import read_config
from pipeline.doctor.storage import check_dataset, check_run_folder, check_storage
from tests.pipeline.runs import ROOT, contents, pack_two


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack_two(tmp_path)


@pytest.mark.parametrize("run", [".", "run", "not/yet/there"])
def test_a_run_folder_is_tried_where_it_is_or_will_be_and_left_as_it_was(tmp_path: Path, run: str) -> None:
    (tmp_path / "kept").write_text("kept")
    (check,) = check_run_folder(str(tmp_path / run))
    assert (check.state, check.what) == ("ok", "run.dir")
    assert check.figures.keys() == {"free", "write", "read"}
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.parametrize("run", ["/proc/run", "{tmp_path}/file", "{tmp_path}/file/run"])
def test_a_run_folder_that_cannot_be_written_is_broken(tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("")
    place = run.format(tmp_path=tmp_path)
    (check,) = check_run_folder(place)
    assert check.state == "broken"
    assert place in check.detail and "run.dir=" in check.advice


def test_a_dataset_that_can_be_read_is_measured_and_left_as_it_was(packed: Path) -> None:
    before = contents(packed)
    (check,) = check_dataset("data.val", str(packed))
    assert (check.state, check.what, check.figures.keys()) == ("ok", "data.val", {"read"})
    assert "2 samples in 2 shards" in check.detail
    assert contents(packed) == before


@pytest.mark.parametrize("url", ["{packed}/elsewhere", "nosuch://store/train", "file://{packed}/elsewhere"])
def test_a_dataset_that_is_not_there_is_broken(packed: Path, url: str) -> None:
    url = url.format(packed=packed)
    (check,) = check_dataset("data.train", url)
    assert check.state == "broken"
    assert url in check.detail and "data.train" in check.advice


def test_a_dataset_without_its_shards_is_broken(packed: Path) -> None:
    for shard in packed.glob("*.tar"):
        shard.unlink()
    (check,) = check_dataset("data.train", str(packed))
    assert check.state == "broken" and ".tar" in check.detail


def test_a_configurations_storage_is_its_run_folder_and_its_datasets(packed: Path) -> None:
    settings = [f"run.dir={packed.parent}/run", f"data.train={packed}"]
    for val, expected in (("null", {}), (packed / "elsewhere", {"data.val": "broken"})):
        config = read_config(str(ROOT / "configs" / "tiny.yaml"), [*settings, f"data.val={val}"])
        states = {check.what: check.state for check in check_storage(config)}
        assert states == {"run.dir": "ok", "data.train": "ok", **expected}
