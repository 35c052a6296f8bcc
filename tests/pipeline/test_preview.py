"""Laws of the contact sheet: it has the pixels of training and the draws, and stays readable."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import augment
from data.loader import LoaderSpec, training_batches
from data.packing.pack import pack
from data.randaugment import Operation, describe
from data.shards.tar_index import index_tar
from pipeline.commands.preview import BETWEEN, GAP, LINE, SheetItem, preview, sheet, sheet_items
from pipeline.config.parsing import read_config
from pipeline.errors import UsageError
from pipeline.plan import augmentation, training_set
from pipeline.training.mixup import mixup

SIDE, TIMES, SAMPLES = 24, 6, 45
CONFIG = """
run: {seed: 5}
data: {train: FOLDER/packed, shuffle_window: 3}
model: {name: coatnet_0, resolution: 24}
augment: {randaugment: {layers: 2, magnitude: 8}}
train: {epochs: 1, global_batch: 8, micro_batch: 4}
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A preset whose set has 45 images, each of a class of its own."""
    folder = tmp_path_factory.mktemp("preview")
    for number in range(SAMPLES):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        (folder / "images" / f"kind {number}").mkdir(parents=True)
        image = Image.fromarray(pixels).resize((30 + number, 40), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"kind {number}" / f"{number}.png")
    request = {"samples_per_shard": 20, "bytes_per_shard": None, "seed": 0, "workers": 2, "overwrite": False}
    pack(str(folder / "images"), str(folder / "packed"), **request, progress=lambda done, total: None)
    (folder / "preset.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    return str(folder / "preset.yaml")


def trained_on(preset: str, overrides: list[str], positions: range) -> np.ndarray:
    """The images at these positions of the stream as a training step has them, mixed; uint8."""
    config = read_config(preset, overrides)
    manifest, order = training_set(config)
    share = LoaderSpec(0, 1, config.train.micro_batch, SIDE, torch.device("cpu"), 1)
    with training_batches(manifest, order, augmentation(config.augment), share, config.run.seed, 0, 20) as steps:
        batches = [batch for step in steps for batch in step]
    images = []
    for batch in batches:
        pixels = batch.images.permute(0, 3, 1, 2).float()
        if config.augment.mixup:
            nothing = torch.zeros(len(pixels), 1)
            pixels, _ = mixup(pixels, nothing, config.augment.mixup, config.run.seed, batch.positions)
        images.append(pixels.permute(0, 2, 3, 1).round().byte())
    return torch.cat(images).numpy()[positions.start : positions.stop]


@pytest.mark.parametrize(("epoch", "mixup"), [(0, 0.7), (1, 0.0)])
def test_the_pictures_are_those_of_training_to_the_pixel(preset, epoch, mixup):
    overrides, first = [f"augment.mixup={mixup}"], -(-epoch * SAMPLES // 4) * 4
    shown = sheet_items(read_config(preset, overrides), 10, epoch)
    expected = trained_on(preset, overrides, range(first, first + 10))
    np.testing.assert_array_equal([each.augmented for each in shown], expected)
    again = trained_on(
        preset, ["augment.crop=center", "augment.flip=false", "augment.randaugment.layers=0"], range(first, first + 10)
    )
    np.testing.assert_array_equal([each.original for each in shown], again)
    pixels = np.array(Image.open(io.BytesIO(sheet(shown, "a title"))).convert("RGB"))
    for picture in [each.augmented for each in shown] + [each.original for each in shown]:
        assert occurs(picture.repeat(TIMES, 0).repeat(TIMES, 1), pixels)


def occurs(picture: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether the picture lies somewhere on the sheet, pixel by pixel."""
    height, width, _ = picture.shape
    first = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 0], width, axis=1)
    return any(
        np.array_equal(pixels[y : y + height, x : x + width], picture)
        for y, x in zip(*np.nonzero((first[: len(pixels) - height + 1] == picture[0, :, 0]).all(axis=2)), strict=True)
    )


def test_below_each_picture_are_its_class_and_its_draws(preset):
    config = read_config(preset, [])
    manifest, order = training_set(config)
    numbers = order.samples_at(np.arange(12))
    keys = [s.key for i in range(3) for s in index_tar(Path(manifest.url_of(i)).read_bytes())]
    rows = np.concatenate([np.load(manifest.url_of(i, ".npy")) for i in range(3)])[numbers]
    params = augment.sample_params(augmentation(config.augment), 5, 0, numbers, rows["height"], rows["width"])
    for i, shown in enumerate(sheet_items(config, 12, 0)):
        name, crop, *operations = shown.lines
        assert name == keys[numbers[i]].split("/")[0].replace("_", " ")
        share = params.crop_shape[i].prod() / (int(rows["height"][i]) * int(rows["width"][i]))
        assert crop == f"crop {100 * share:.0f} % of the area" + (", mirrored" if params.flip[i] else "")
        signs = [-1 if negative else 1 for negative in params.signs[i]]
        pairs = zip(params.operations[i], signs, strict=True)
        assert operations == [describe(Operation(operation), 8, sign) for operation, sign in pairs]


def test_mixup_partners_and_replaced_samples_are_named(preset, tmp_path):
    config = read_config(preset, ["augment.mixup=0.7"])
    lines = [line for shown in sheet_items(config, 40, 0) for line in shown.lines]
    assert sum(line.startswith("mixed with ") and " % of kind " in line for line in lines) > 20
    for file in Path(config.data.train).iterdir():
        contents = bytearray(file.read_bytes())
        if file.name == "shard-000001.tar":
            place = index_tar(bytes(contents))[4].parts["png"][0]
            contents[place + 20] ^= 1
        (tmp_path / file.name).write_bytes(contents)
    shown = sheet_items(read_config(preset, [f"data.train={tmp_path}"]), 1000, 0)
    assert len(shown) == SAMPLES and sum("replaces " in line for each in shown for line in each.lines) == 1


@pytest.mark.parametrize("count", [1, 5, 23])
def test_long_text_stays_below_its_pictures(count):
    """Nothing is drawn between samples, around them, or over a picture."""
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    long = "a class $with^a_very % {long} \\name " * 5
    shown = [SheetItem(black, black, [long, "crop 5 %", long, long]) for _ in range(count)]
    drawn = np.array(Image.open(io.BytesIO(sheet(shown, long))).convert("L"))[2 * LINE :] < 255
    width, height = 2 * SIDE * TIMES + BETWEEN + 2 * GAP, SIDE * TIMES + 4 * LINE + GAP
    columns = (drawn.shape[1] - GAP) // width
    assert drawn.shape == (height * -(-count // columns), columns * width + GAP) and columns == min(count, 6)
    for number in range(count):
        y, x = number // columns * height, number % columns * width
        assert drawn[y : y + SIDE * TIMES, x + GAP : x + GAP + SIDE * TIMES].all()
        assert not drawn[y : y + height, [x, x + 1, x + GAP - 1, x + width - 1]].any()
        assert drawn[y + SIDE * TIMES : y + height - GAP, x + GAP :].any() and not drawn[y + height - 4].any()


@pytest.mark.parametrize(
    ("out", "override", "message"),
    [
        ("sheet.jpg", "run.seed=0", "must be a .png"),
        ("nowhere/sheet.png", "run.seed=0", "cannot be written"),
        ("folder.png", "run.seed=0", "cannot be written"),
        ("sheet.png", "augment.flop=true", "augment.flop: unknown; did you mean augment.flip?"),
        ("sheet.png", "train.micro_batch=x", 'train.micro_batch=x: train.micro_batch is "x"'),
        ("sheet.png", "data.train=elsewhere", "data.train=elsewhere"),
        ("sheet.png", "data.train_samples=44", "has 45"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line_without_a_file(preset, tmp_path, out, override, message):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError) as refused:
        preview(preset, str(tmp_path / out), [override], 8, 0)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "sheet.png").exists()
