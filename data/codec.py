"""What an image file is and how large, found by decoding it whole with nvImageCodec, DALI's own codecs, on the CPU.

DALI's decoder can end the process on damaged bytes; nvImageCodec answers them with nothing worse than None. So bytes
of unknown origin come here first, and what decodes here decodes in DALI. Any number of threads may call: each has its
own decoder of one thread, and the interpreter is free while it decodes.
"""

import os
import threading
from typing import Any, NamedTuple

# The codecs write lines of their own about each damaged image; callers name it once, with the reason. Read at import.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

from nvidia import nvimgcodec as _compiled

nvimgcodec: Any = _compiled  # it has no type stubs
EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "tiff": "tif",
    "pnm": "ppm",
    "jpeg2k": "jp2",
}
MOST_PIXELS = 2**28
_UPRIGHT = nvimgcodec.DecodeParams(apply_exif_orientation=True)
_of_thread = threading.local()


class Undecodable(ValueError):
    """The bytes are not an image that decodes to its end; the message says in a few words why."""


class Picture(NamedTuple):
    """Kind (the extension of a shard's member: "jpg", "png", ...) and size as decoded, EXIF orientation applied."""

    kind: str
    height: int
    width: int


def examine(encoded: bytes) -> Picture:
    """Kind and size of an image that decodes whole; Undecodable with the reason for any other bytes."""
    return decode(encoded)[0]


def decode(encoded: bytes) -> tuple[Picture, Any]:
    """Kind and size, and the pixels as nvImageCodec's image, uint8 RGB [height, width, 3]; Undecodable if not whole."""
    if not encoded:
        raise Undecodable("empty file")
    try:
        stream = nvimgcodec.CodeStream(encoded)
        kind, pixels = EXTENSIONS[stream.codec_name], stream.height * stream.width
    except (RuntimeError, KeyError):
        raise Undecodable(f"its header is not that of an image ({' '.join(EXTENSIONS.values())})") from None
    if pixels > MOST_PIXELS:
        raise Undecodable(f"{pixels} pixels; {MOST_PIXELS} at most are taken")
    image = codec_of_thread("Decoder").decode(stream, params=_UPRIGHT)
    if image is None:
        raise Undecodable("does not decode: truncated or damaged")
    return Picture(kind, *image.shape[:2]), image


def codec_of_thread(kind: str) -> Any:
    """This thread's own nvImageCodec "Decoder" or "Encoder", on the CPU and of one thread."""
    if not hasattr(_of_thread, kind):
        made = getattr(nvimgcodec, kind)(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )
        setattr(_of_thread, kind, made)
    return getattr(_of_thread, kind)
