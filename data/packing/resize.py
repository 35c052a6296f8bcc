"""Images made smaller and encoded as JPEG, on request only: all others are packed with their own bytes.

Pixels are made upright and RGB by the decoder, resampled by an antialiased bicubic filter in integers, and encoded by
nvImageCodec's CPU encoder, which is libjpeg-turbo: the same bytes give the same bytes, in any thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.codec import EXTENSIONS, Picture, Undecodable, codec_of_thread, decode, nvimgcodec


def shrink(encoded: bytes, shorter_side: int, quality: int) -> tuple[bytes, Picture]:
    """The image with its shorter side at most this long, and what it is; Undecodable where it does not decode whole.

    One that is no larger is as packing takes it. `quality` is libjpeg's, 1 to 100; colours are subsampled 4:2:0.
    """
    encoded, picture, pixels = decode(encoded)
    shorter = min(picture.height, picture.width)
    if shorter <= shorter_side:
        return encoded, picture
    height, width = (max(1, round(side * shorter_side / shorter)) for side in (picture.height, picture.width))
    smaller = _resampled(pixels, height, width)
    stream = codec_of_thread("Encoder").encode(smaller, "jpeg", params=_params(quality))
    if stream is None:  # a side of more than 65,535 pixels
        raise Undecodable(f"a JPEG cannot hold {height} x {width} pixels")
    return bytes(stream), Picture(EXTENSIONS["jpeg"], height, width)


def _resampled(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    import torch

    torch.set_num_threads(1)  # of this thread: others do other images
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    smaller = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(smaller[0].permute(1, 2, 0).numpy())


def _params(quality: int) -> Any:
    return nvimgcodec.EncodeParams(
        quality_type=nvimgcodec.QualityType.QUALITY,
        quality_value=quality,
        jpeg_encode_params=nvimgcodec.JpegEncodeParams(optimized_huffman=True),
    )
