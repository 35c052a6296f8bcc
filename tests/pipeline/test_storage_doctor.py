"""What the doctor says of real folders and packed datasets, whole and not, and that it leaves nothing behind."""

from pathlib import Path

import pytest

from pipeline.config.parsing import read_config
from pipeline.doctor.findings import Check
from pipeline.doctor.storage import check_dataset, check_run_folder, check_storage
from tests.pipeline.runs import ROOT, contents, pack_two


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack_two(tmp_path)


def measured(finding: Check) -> set[str]:
    return {figure.what for figure in finding.figures if figure.value > 0}


@pytest.mark.parametrize("run", [".", "run", "not/yet/there"])
def test_a_run_folder_is_tried_where_it_is_or_will_be_and_left_as_it_was(tmp_path: Path, run: str) -> None:
    (tmp_path / "kept").write_text("kept")
    finding = check_run_folder(tmp_path / run)
    assert (finding.state, finding.what) == ("ok", "run.dir")
    assert measured(finding) == {"free", "write", "read", "fsync"}
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.parametrize("run", ["/proc/run", "{tmp_path}/file", "{tmp_path}/file/run"])
def test_a_run_folder_that_cannot_be_written_is_broken(tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("")
    place = run.format(tmp_path=tmp_path)
    finding = check_run_folder(Path(place))
    assert finding.state == "broken"
    assert place in finding.detail and "run.dir=" in finding.advice


def test_a_dataset_that_can_be_read_is_measured_and_left_as_it_was(packed: Path) -> None:
    before = contents(packed)
    finding = check_dataset("data.val", str(packed))
    assert (finding.state, finding.what) == ("ok", "data.val")
    assert "2 samples in 2 shards" in finding.detail
    assert measured(finding) == {"first byte after", "read"}
    assert contents(packed) == before


@pytest.mark.parametrize("url", ["{packed}/elsewhere", "nosuch://store/train", "file://{packed}/elsewhere"])
def test_a_dataset_that_is_not_there_is_broken(packed: Path, url: str) -> None:
    url = url.format(packed=packed)
    finding = check_dataset("data.train", url)
    assert finding.state == "broken"
    assert url in finding.detail and "data.train" in finding.advice


def test_a_dataset_whose_shards_are_gone_is_broken(packed: Path) -> None:
    for shard in packed.glob("*.tar"):
        shard.unlink()
    finding = check_dataset("data.train", str(packed))
    assert finding.state == "broken"
    assert ".tar" in finding.detail


def test_a_configuration_s_storage_is_its_run_folder_and_the_datasets_that_it_names(packed: Path) -> None:
    settings = [f"run.dir={packed.parent}/run", f"data.train={packed}"]
    for val, expected in (("null", {}), (packed / "elsewhere", {"data.val": "broken"})):
        config = read_config(str(ROOT / "configs" / "tiny.yaml"), [*settings, f"data.val={val}"])
        found = {finding.what: finding.state for finding in check_storage(config)}
        assert found == {"run.dir": "ok", "data.train": "ok", **expected}
