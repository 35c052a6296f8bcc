"""`coatnet predict` sees what `coatnet evaluate` sees, and what does not decode is left out and told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from data.shards import read_manifest
from pipeline import weights_file
from pipeline.errors import BadRequest
from pipeline.export import export
from pipeline.predict import image_files, predict
from pipeline.weights_file import WeightsFile
from tests.pipeline.runs import ROOT, coatnet


@pytest.fixture(scope="module")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network after two steps, as a file."""
    folder = tmp_path_factory.mktemp("predicting")
    data = [f"data.train={digits}/val", "data.val=null", f"run.dir={folder}/run", "log.samples=false"]
    done = coatnet("pretrain", ROOT / "configs" / "tiny.yaml", *data, "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert export(str(folder / "run"), str(folder / "tiny.safetensors"), None, None, overwrite=False) == 0
    return folder / "tiny.safetensors"


def predicted(capsys: pytest.CaptureFixture[str], source: Path, *images: Path, status: int = 0, **how: Any) -> Any:
    asked: dict[str, Any] = {"weights": None, "resolution": None, "crop": None, "most": 5, **how}
    assert predict(str(source), [str(image) for image in images], as_json=True, **asked) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("how", [[], ["--resolution", "48", "--crop", "none"]])
def test_what_is_predicted_of_the_files_is_what_is_evaluated_of_the_packed_set(
    exported: Path, digits: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    figures = json.loads(coatnet("evaluate", exported, "--data", digits / "val", "--json", *how).stdout)
    images = digits / "digits" / "val"
    asked: dict[str, Any] = {"resolution": 48, "crop": "none"} if how else {}
    found = predicted(capsys, exported, images, **asked)
    assert [row["file"] for row in found] == [str(file) for file in sorted(images.rglob("*.*"))]
    ranked = [(Path(row["file"]).parent.name, [each["class"] for each in row["predictions"]]) for row in found]
    assert len(found) == figures["samples"] == 360
    assert sum(own == classes[0] for own, classes in ranked) / 360 == figures["top1"]
    assert sum(own in classes for own, classes in ranked) / 360 == figures["top5"]
    for row in found:
        probabilities = [each["probability"] for each in row["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 1


def test_what_does_not_decode_is_left_out_in_its_place_and_named(
    exported: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((digits / "digits" / "val" / "7").iterdir())[0]
    contents = {"a.png": good.read_bytes(), "b.png": good.read_bytes()[:-40], "c.jpg": b"no image", "notes.txt": b"-"}
    for name, content in {**contents, "deep/e.PNG": good.read_bytes(), ".hidden/x.png": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.png").touch()
    found = predicted(capsys, exported, tmp_path, good, status=1, most=2)
    assert [Path(row["file"]).name for row in found] == ["a.png", "b.png", "c.jpg", "d.png", "e.PNG", good.name]
    assert [len(row["predictions"]) for row in found] == [2, 0, 0, 0, 2, 2]
    assert [bool(row.get("error")) for row in found] == [False, True, True, True, False, False]
    assert found[0]["predictions"] == found[4]["predictions"] == found[5]["predictions"]
    done = coatnet("predict", exported, tmp_path / "a.png", tmp_path / "c.jpg")
    assert done.returncode == 1 and done.stdout.count("\n") == 1 and done.stdout.count(" %") == 5
    assert [line for line in done.stderr.splitlines() if line.startswith("left out")] == [
        f"left out: {tmp_path}/c.jpg: its header is not that of an image (jpg png webp bmp tif ppm jp2)"
    ]


def test_of_a_sigmoid_head_each_class_has_a_probability_of_its_own(
    exported: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, image = WeightsFile(exported).state(), sorted((digits / "digits" / "val" / "3").iterdir())[0]
    said["config"]["train"]["loss"] = "sigmoid"
    weights_file.write(tmp_path / "sigmoid.safetensors", load_file(exported), said)
    (softmax,), (sigmoid,) = (
        predicted(capsys, source, image, most=99) for source in (exported, tmp_path / "sigmoid.safetensors")
    )
    odds = {each["class"]: each["probability"] / (1 - each["probability"]) for each in sigmoid["predictions"]}
    assert len(odds) == len(read_manifest(str(digits / "val")).classes) == 10
    assert {each["class"]: each["probability"] for each in softmax["predictions"]} == {
        name: pytest.approx(value / math.fsum(odds.values()), rel=1e-4) for name, value in odds.items()
    }


@pytest.mark.parametrize(
    ("path", "said"), [("nowhere.jpg", "is no file and no folder"), (".", "has no images; they are known by")]
)
def test_paths_without_images_are_wrong_requests(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        image_files([tmp_path / path])
