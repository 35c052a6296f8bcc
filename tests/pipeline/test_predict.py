"""`coatnet predict` sees what `coatnet evaluate` sees, and reports what does not decode."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from data.packing.sources import list_source
from data.shards.manifest import read_manifest
from pipeline.checkpoint import weights
from pipeline.checkpoint.weights import WeightsFile
from pipeline.commands import predict as commands
from pipeline.commands.predict import image_files, predict, read
from pipeline.errors import UsageError
from tests.data import test_isolation
from tests.data.image_files import converted
from tests.pipeline.networks import export_network, tiny
from tests.pipeline.runs import coatnet


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network for the digits, as a file."""
    return export_network(tmp_path_factory.mktemp("predicting") / "tiny.safetensors", *tiny(10), "0123456789").folder


def predicted(capsys: pytest.CaptureFixture[str], source: Path, *images: Path, status: int = 0, **how: Any) -> Any:
    asked: dict[str, Any] = {"weights": None, "resolution": None, "crop": None, "top": 5, **how}
    assert predict(str(source), [str(image) for image in images], as_json=True, **asked) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("how", [{}, {"resolution": 48, "crop": "0.8"}])
def test_predictions_of_files_are_the_metrics_of_the_packed_set(
    exported: Path, digits: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any]
) -> None:
    options = [f"--{name}={value}" for name, value in how.items()]
    metrics = json.loads(coatnet("evaluate", exported, "--data", digits / "val", "--json", *options).stdout)
    files = sorted((digits / "digits" / "val").glob("*/*"))
    found = predicted(capsys, exported, digits / "digits" / "val", top=10, **how)
    assert [row["file"] for row in found] == [str(file) for file in files] and len(files) == metrics["samples"] == 360
    ranks, losses = [], []
    for row in found:
        probabilities = {each["class"]: each["probability"] for each in row["predictions"]}
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True) and len(probabilities) == 10
        ranks.append(list(probabilities).index(Path(row["file"]).parent.name))
        losses.append(-math.log([*probabilities.values()][ranks[-1]]))
    assert (ranks.count(0) / 360, sum(rank < 5 for rank in ranks) / 360) == (metrics["top1"], metrics["top5"])
    assert math.fsum(losses) / 360 == pytest.approx(metrics["loss"], rel=1e-6)


def test_what_does_not_decode_is_in_its_place_with_an_error(
    exported: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((digits / "digits" / "val" / "7").iterdir())[0]
    contents = {"a.png": good.read_bytes(), "b.png": good.read_bytes()[:-40], "c.jpg": b"no image", "notes.txt": b"-"}
    for name, content in {**contents, "deep/e.PNG": good.read_bytes(), ".hidden/x.png": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "caf\udce9.png").write_bytes(b"not UTF-8, its name")
    (tmp_path / "d.png").touch()
    found = predicted(capsys, exported, tmp_path, good, status=1, top=2)
    names = " ".join(Path(row["file"]).name for row in found)
    assert names == rf"a.png b.png c.jpg caf\udce9.png d.png e.PNG {good.name}"
    assert [len(row["predictions"]) for row in found] == [2, 0, 0, 0, 0, 2, 2]
    assert [bool(row.get("error")) for row in found] == [False, True, True, True, True, False, False]
    assert found[0]["predictions"] == found[5]["predictions"] == found[6]["predictions"]
    for number in range(30):
        (tmp_path / "deep" / f"{number:02d}.txt").touch()
    done = coatnet("predict", exported, tmp_path / "deep")
    passed_over = [line for line in done.stderr.splitlines() if line.startswith("skipped")]
    assert done.returncode == 0 and len(passed_over) == 20 and "and 10 more files are skipped" in done.stderr
    assert f"{tmp_path}/deep/00.txt: its suffix is not that of an image" in passed_over[0]
    done = coatnet("predict", exported, tmp_path / "a.png", tmp_path / "c.jpg")
    assert done.returncode == 1 and done.stdout.count("\n") == 1 and done.stdout.count(" %") == 5
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("left out")]
    assert f"{tmp_path}/c.jpg" in warning


def test_a_file_that_only_dali_cannot_decode_is_named_too(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, contents in {"a.ppm": test_isolation.image(1), "b.tif": test_isolation.signed_tiff(1)}.items():
        (tmp_path / name).write_bytes(contents)
    size = test_isolation.SIDE
    monkeypatch.setattr(commands, "read", lambda file: commands.Image(file, file.read_bytes(), size, size))
    first, second = predicted(capsys, exported, tmp_path, status=1)
    assert len(first["predictions"]) == 5 and "error" not in first
    assert second["predictions"] == [] and second["error"].startswith("cannot be decoded")


def test_with_the_sigmoid_loss_each_class_has_an_independent_probability(
    exported: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata, image = WeightsFile(exported).state(), sorted((digits / "digits" / "val" / "3").iterdir())[0]
    metadata["config"]["train"]["loss"] = "sigmoid"
    weights.write(tmp_path / "sigmoid.safetensors", load_file(exported), metadata)
    sources = exported, tmp_path / "sigmoid.safetensors"
    (softmax,), (sigmoid,) = (predicted(capsys, source, image, top=99) for source in sources)
    odds = {each["class"]: each["probability"] / (1 - each["probability"]) for each in sigmoid["predictions"]}
    assert len(odds) == len(read_manifest(str(digits / "val")).classes) == 10
    assert {each["class"]: each["probability"] for each in softmax["predictions"]} == {
        name: pytest.approx(value / math.fsum(odds.values()), rel=1e-4) for name, value in odds.items()
    }


def test_a_folder_has_the_images_that_packing_finds_in_it(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    hidden = ["photos/.hidden/x.png", "photos/dog/.y.png", "photos/__MACOSX/cat/a.jpg"]
    for name in ["photos/cat/a.jpg", "photos/cat/deep/B.PNG", "photos/dog/notes.txt", "elsewhere/c.webp", *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(photos / "dog" / "pipe.png")
    for name, target in {"linked": "../../elsewhere", "up": "..", "lost.jpg": "nowhere.jpg"}.items():
        (photos / "dog" / name).symlink_to(target)
    packed = [image.path for image, _ in list_source(str(photos)).images()]
    assert packed == ["cat/a.jpg", "cat/deep/B.PNG", "dog/linked/c.webp"]
    files, passed_over = image_files([photos])
    assert [str(file.relative_to(photos)) for file in files] == [*packed, "dog/lost.jpg"]
    reasons = {str(file.relative_to(photos)): reason for file, reason in passed_over}
    assert reasons.pop("dog/notes.txt").startswith("its suffix is not that of an image (.bmp")
    assert reasons == {
        ".hidden": "hidden",
        "__MACOSX": "hidden",
        "dog/.y.png": "hidden",
        "dog/pipe.png": "not a regular file",
        "dog/up": "a link to a folder that contains it",
    }
    assert read(photos / "dog" / "lost.jpg").error == "No such file or directory"


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere.jpg", "does not exist"), (".", "has no image files"), ("n" * 300, "read: File name too long")],
)
def test_paths_without_images_are_wrong_requests(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        image_files([tmp_path / path])


def test_a_file_that_packing_would_convert_is_predicted_by_its_pixels(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, variant in converted(everything=False):
        files = tmp_path / f"{name}.tif", tmp_path / f"{name}.png"
        files[0].write_bytes(variant.encoded)
        Image.fromarray(variant.pixels).save(files[1])
    rows = predicted(capsys, exported, tmp_path)
    by_file = {Path(row["file"]).name: row["predictions"] for row in rows}
    assert all(by_file[name] == by_file[f"{name[:-4]}.tif"] for name in by_file if name.endswith(".png"))
