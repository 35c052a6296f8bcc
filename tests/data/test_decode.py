"""Pixels: what the parameters say, from whatever bytes, whatever they are batched with; the decoder's manners."""

import gc
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from io import BytesIO
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data import decode
from data.augment import Augmentation, AugmentParams, eval_params, sample_params
from data.decode import Decoder
from data.errors import DataError

SIDE = 48
Device = Literal["cpu", "gpu"]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
FULL = Augmentation(crop="random_resized", flip=True, layers=2, magnitude=10)


def picture(number: int, height: int = 60, width: int = 80) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    image.save(file := BytesIO(), kind, **options)
    return file.getvalue()


def upright(image: bytes) -> np.ndarray:
    """Pillow's decoding, [height, width, 3]."""
    return np.array(ImageOps.exif_transpose(Image.open(BytesIO(image))).convert("RGB"))


def decoder_of(
    images: Sequence[bytes],
    params: AugmentParams,
    *,
    batches: Sequence[Sequence[int]] | None = None,
    threads: int = 1,
    ahead: int = 2,
    resolution: int = SIDE,
    device: Device = "cpu",
) -> Decoder:
    """A decoder of these images in batches of these indices; by default one batch of all of them."""
    chosen = [np.array(batch, np.int64) for batch in (batches or [range(len(images))])]
    answers = iter(
        [([images[i] for i in b], AugmentParams(*(getattr(params, f.name)[b] for f in fields(params)))) for b in chosen]
    )
    return Decoder(
        resolution=resolution,
        batch_size=max(len(batch) for batch in chosen),
        layers=params.operations.shape[1],
        magnitude=FULL.magnitude,
        device=device,
        device_id=0 if device == "gpu" else None,
        threads=threads,
        source=lambda: next(answers),
        ahead=ahead,
    )


def pixels_of(images: Sequence[bytes], params: AugmentParams, **options) -> np.ndarray:
    return torch.cat(list(decoder_of(images, params, **options))).cpu().numpy()


def whole(image: bytes, count: int = 1) -> AugmentParams:
    """The parameters that take all of an upright image as it is."""
    height, width, _ = upright(image).shape
    shape = np.tile(np.array([height, width], np.int32), (count, 1))
    return replace(eval_params(1.0, [height] * count, [width] * count), crop_start=shape * 0, crop_shape=shape)


def sample_set(count: int = 40) -> tuple[list[bytes], AugmentParams]:
    """JPEGs and PNGs of several sizes, each with its crop, flip and two operations."""
    images = [picture(i, 30 + 7 * (i % 9), 90 - 5 * (i % 11)) for i in range(count)]
    files = [encoded(image, "PNG" if i % 5 == 0 else "JPEG") for i, image in enumerate(images)]
    sizes = np.array([image.size for image in images])
    return files, sample_params(FULL, 0, 0, np.arange(count), sizes[:, 1], sizes[:, 0])


def split(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


# ------------------------------------------------------------------------------------------------------ a pure function


@on_each_device
@pytest.mark.parametrize(
    ("size", "threads", "ahead", "most"), [(1, 1, 2, 1), (7, 2, 2, 20_000), (16, 1, 1, 1), (33, 2, 4, 60_000)]
)
def test_a_samples_pixels_do_not_depend_on_its_batch(
    size: int, threads: int, ahead: int, most: int, device: Device, monkeypatch
) -> None:
    """Nor on its neighbours, its place, threads, how far DALI runs ahead and how much it decodes at once."""
    files, params = sample_set()
    together = pixels_of(files, params, device=device)
    monkeypatch.setattr(decode, "DECODED_BYTES", most)
    order = np.random.default_rng(size).permutation(len(files))
    batches = split(order.tolist(), size)
    decoder = decoder_of(files, params, batches=batches, threads=threads, ahead=ahead, device=device)
    for pixels, batch in zip(decoder, batches, strict=True):
        np.testing.assert_array_equal(pixels.cpu().numpy(), together[np.array(batch)])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_what_dali_decodes_at_once_is_bounded_and_no_less_than_that(sizes: list[int], most: int) -> None:
    parts = list(decode.parts_within(np.array(sizes, np.int64), most))
    found = [sizes[part] for part in parts]
    assert list(itertools.chain(*found)) == sizes and (len(parts) == 1 or all(found))
    assert all(len(part) == 1 or sum(part) <= most for part in found if part)
    assert all(sum(part) + following[0] > most for part, following in itertools.pairwise(found))


def test_batches_come_in_order_and_as_large_as_they_were_asked_for() -> None:
    files, params = sample_set()
    asked = [[3, 1, 2], [], [0], list(range(40)), [7, 7]]
    everything = pixels_of(files, params)
    for pixels, batch in zip(decoder_of(files, params, batches=asked), asked, strict=True):
        assert pixels.shape == (len(batch), SIDE, SIDE, 3) and pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels.numpy(), everything[np.array(batch, int)])


@on_each_device
def test_kept_batches_stay_as_they_were(device: Device) -> None:
    files, params = sample_set()
    batches = [range(20 * (i % 2), 20 * (i % 2) + 20) for i in range(12)]
    decoder = decoder_of(files, params, batches=batches, device=device)
    kept = [next(decoder) for _ in range(5)]
    copies = [pixels.clone() for pixels in kept]
    later = [next(decoder) for _ in range(7)]
    decoder.close()
    assert len({pixels.data_ptr() for pixels in kept + later}) == 12
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


# ----------------------------------------------------------------------------------------------- crop, resize, flip


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_crop_of_the_output_size_is_pillows_to_the_bit(kind: str) -> None:
    """Nothing is resampled then, so the crop of the decoder is the slice of the whole image."""
    file = encoded(picture(1, 90, 120), kind)
    places = np.array([[0, 0], [42, 72], [17, 31], [1, 70]], np.int32)
    params = replace(whole(file, 4), crop_start=places, crop_shape=np.full((4, 2), SIDE, np.int32))
    expected = [upright(file)[y : y + SIDE, x : x + SIDE] for y, x in places]
    np.testing.assert_array_equal(pixels_of([file] * 4, params), expected)
    mirrored = replace(params, flip=np.ones(4, np.int32))
    np.testing.assert_array_equal(pixels_of([file] * 4, mirrored), np.stack(expected)[:, :, ::-1])


def test_a_resized_crop_sees_nothing_outside_of_it() -> None:
    file = encoded(picture(2, 300, 200))
    params = sample_params(replace(FULL, layers=0), 0, 0, np.arange(20), np.full(20, 300), np.full(20, 200))
    cut = [
        upright(file)[y : y + h, x : x + w] for (y, x), (h, w) in zip(params.crop_start, params.crop_shape, strict=True)
    ]
    alone = [encoded(Image.fromarray(each), "PNG") for each in cut]
    uncropped = replace(params, crop_start=params.crop_start * 0)
    np.testing.assert_array_equal(pixels_of([file] * 20, params), pixels_of(alone, uncropped))


@pytest.mark.parametrize(("height", "width"), [(300, 200), (20, 31), (48, 500)])
def test_resizing_is_pillows_antialiased_bilinear(height: int, width: int) -> None:
    file = encoded(picture(3, height, width), "PNG")
    expected = np.array(Image.fromarray(upright(file)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(int)
    plain, mirrored = pixels_of([file] * 2, replace(whole(file, 2), flip=np.array([0, 1], np.int32))).astype(int)
    assert abs(plain - expected).max() <= 2
    assert abs(mirrored - plain[:, ::-1]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_comes_upright_and_is_cropped_upright(orientation: int) -> None:
    image = picture(11, 60, 80)
    (exif := image.getexif())[274] = orientation
    file = encoded(image, exif=exif)
    params = whole(file)
    corner = replace(params, crop_start=params.crop_shape - SIDE, crop_shape=np.full((1, 2), SIDE, np.int32))
    np.testing.assert_array_equal(pixels_of([file], corner)[0], upright(file)[-SIDE:, -SIDE:])


# ------------------------------------------------------------------------------------------------------------ manners


@pytest.mark.parametrize("error", [ValueError("shard 7 is gone"), RuntimeError("no such window")])
def test_an_error_of_the_source_comes_out_as_it_is_and_again(error: Exception) -> None:
    files, params = sample_set(4)

    def source() -> Iterator[tuple[list[bytes], AugmentParams]]:
        yield files, params
        yield files, params
        raise error

    answers = source()
    decoder = Decoder(
        resolution=SIDE, batch_size=4, layers=2, magnitude=5, device="cpu", device_id=None, threads=1,
        source=lambda: next(answers),
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            list(decoder)
        assert raised.value is error


def test_an_error_of_dali_is_one_line_and_ends_the_decoder() -> None:
    file = encoded(picture(1, SIDE, SIDE))
    # One image in one batch: with more of them such a crop can end the process.
    decoder = decoder_of([file], replace(whole(file), crop_start=np.array([[5, 0]], np.int32)))
    for _ in range(2):
        with pytest.raises(DataError, match=r"cropping window .* is not valid for image dimensions") as raised:
            next(decoder)
        assert "\n" not in str(raised.value)


def test_a_closed_decoder_is_at_its_end_and_its_threads_are_gone() -> None:
    files, params = sample_set(4)
    next(decoder_of(files, params, batches=[[0]] * 9))  # libraries start threads of their own at the first use
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    decoder = decoder_of(files, params, batches=[[0, 1]] * 9, threads=3)
    kept = next(decoder)
    assert len(os.listdir("/proc/self/task")) >= before + 3
    decoder.close()
    assert len(os.listdir("/proc/self/task")) == before
    assert list(decoder) == [] and kept.sum() > 0


@pytest.mark.parametrize("ending", ["", "decoder.close()"])
def test_a_process_ends_with_an_open_decoder_and_without_a_gpu(ending: str) -> None:
    program = f"""
        import io, threading
        from PIL import Image
        from data.augment import eval_params
        from data.decode import Decoder
        Image.new("RGB", (40, 40)).save(file := io.BytesIO(), "JPEG")
        answer = [file.getvalue()], eval_params(1.0, [40], [40])
        decoder = Decoder(resolution=40, batch_size=1, layers=0, magnitude=0, device="cpu", device_id=None, threads=2,
                          source=lambda: answer)
        thread = threading.Thread(target=next, args=(decoder,))
        thread.start(), thread.join()
        print(next(decoder).shape)
        {ending}
    """
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0 and "[1, 40, 40, 3]" in ended.stdout, ended.stderr


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_pixels_to_within_a_few_levels() -> None:
    files, params = sample_set()
    plain = replace(params, operations=params.operations[:, :0], signs=params.signs[:, :0])
    batches = split(range(40), 16)
    decoded = list(decoder_of(files, plain, batches=batches, device="gpu"))
    assert all(
        pixels.is_cuda and pixels.shape == (len(b), SIDE, SIDE, 3) for pixels, b in zip(decoded, batches, strict=True)
    )
    off = abs(torch.cat(decoded).cpu().numpy().astype(int) - pixels_of(files, plain))
    assert off.max() <= 12 and off.mean() < 1
