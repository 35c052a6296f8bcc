"""What an image file is, whether training decodes it rightly, and its pixels: one statement for all that take images.

Training decodes with DALI, which is right about the ordinary variants of each format, wrong about others, and ended by
damaged bytes. So a file of unknown origin comes here first. `_variant` is the table: by its header a file is one of
those that DALI decodes as nvImageCodec does, which has its codecs, or not. The former are decoded whole, and where the
libraries are not Pillow's the pixels must be those of Pillow's `convert("RGB")`: what decodes here decodes in DALI, to
what a person sees. Of all others packing makes a PNG if Pillow decodes them; elsewhere they are refused by name.

Any number of threads may call: each has its own decoder of one thread, and the interpreter is free while it decodes.
"""

import io
import os
import re
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

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
"""Of a shard's member, by nvImageCodec's name of the format."""
MOST_PIXELS = 2**28
_DAMAGED = "cannot be decoded: truncated or damaged"
_PILLOWS = {"pnm": "PPM", "jpeg2k": "JPEG2000"}
_CODESTREAM = b"\xff\x4f\xff\x51"
_SIGNATURES = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"BM": "bmp",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0"), "tiff"),
    **dict.fromkeys((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), "pnm"),
    **dict.fromkeys((b"\0\0\0\x0cjP  \r\n\x87\n", _CODESTREAM), "jpeg2k"),
}
_UNSUPPORTED = {
    b"GIF8": "GIF",
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"\0\0\1\0": "ICO",
    b"MM\0+": "BigTIFF of this byte order",
    b"P7\n": "PAM",
    **dict.fromkeys((b"PF\n", b"Pf\n"), "PFM"),
    **dict.fromkeys((b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL"),
}
_BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIC": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"},
}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG's frame."""
_ALIKE = ("jpeg", "png", "webp")
"""Decoded by the same libraries as in Pillow; of the others each image's pixels are compared."""
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 258, 262, 277, 284, 322, 323, 339
_SAMPLE_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_TIFF_VARIANTS = {
    *((0, 1, bits) for bits in (1, 8)),  # white is zero
    *((1, 1, bits) for bits in (1, 8, 16)),  # black is zero
    *((2, samples, bits) for samples in (3, 4) for bits in (8, 16)),  # RGB
    *((3, 1, bits) for bits in (1, 2, 4, 8)),  # palette
    (5, 4, 8),  # CMYK
    (6, 3, 8),  # YCbCr
}
"""Photometric interpretation, samples a pixel and bits each."""
_UPRIGHT = nvimgcodec.DecodeParams(apply_exif_orientation=True)
_of_thread = threading.local()
Image.MAX_IMAGE_PIXELS = None  # MOST_PIXELS is the bound
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # pyrefly: ignore[bad-assignment]  # a long text is no reason to leave an image out
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata, which is not used


class Undecodable(ValueError):
    """The bytes are not an image that can be used; the message says in a few words why."""


class Picture(NamedTuple):
    """Kind (the extension of a shard's member: "jpg", "png", ...) and size as decoded, EXIF orientation applied."""

    kind: str
    height: int
    width: int


class _Decoded(NamedTuple):
    """Kind and pixels of a file; `variant` says what it is if training would not decode it to them."""

    kind: str
    pixels: Any
    variant: str | None

    @property
    def picture(self) -> Picture:
        return Picture(self.kind, *self.pixels.shape[:2])


def examine(encoded: bytes) -> Picture:
    """Kind and size of an image that training decodes as it is; Undecodable with the reason for any other bytes."""
    decoded = _decode(encoded)
    if decoded.variant:
        raise Undecodable(f"training cannot decode {decoded.variant}; `coatnet data pack` converts it to PNG")
    return decoded.picture


def decode(encoded: bytes) -> tuple[bytes, Picture, NDArray[np.uint8]]:
    """An image as training takes it, what that is, and its pixels, RGB [height, width, 3].

    It keeps its bytes, or becomes a PNG if training would not decode it. Undecodable with the reason for other bytes.
    """
    decoded = _decode(encoded)
    if not decoded.variant:
        return encoded, decoded.picture, np.asarray(decoded.pixels.cpu())
    Image.fromarray(decoded.pixels).save(png := io.BytesIO(), "PNG")
    return png.getvalue(), decoded._replace(kind=EXTENSIONS["png"]).picture, decoded.pixels


def plain(encoded: bytes) -> bytes:
    """The bytes for DALI: the same, or of a variant that it would decode otherwise, by its header, a PNG.

    Only the header is read, since what was packed or indexed is known to decode; older sets may have such variants.
    """
    if encoded[:1] in (b"\x89", b"R"):  # PNG and WebP have none
        return encoded
    try:
        return encoded if _variant(_codec(encoded), encoded) is None else decode(encoded)[0]
    except Undecodable:
        return encoded  # DALI fails on it, and it is named


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


def _decode(encoded: bytes) -> _Decoded:
    """By nvImageCodec what training decodes rightly, else by Pillow, first where damage crashes nvImageCodec."""
    codec = _codec(encoded)
    kind, variant = EXTENSIONS[codec], _variant(codec, encoded)
    image = _opened(codec, encoded, variant)
    if variant:
        return _Decoded(kind, _pillows_pixels(image, variant), variant)
    alike = codec in _ALIKE and image.mode != "CMYK"
    pixels = None if alike else _pillows_pixels(image, None)
    stream = _stream(codec, encoded, image)
    if stream is None:
        pixels = _pillows_pixels(image, None) if pixels is None else pixels
        return _Decoded(kind, pixels, f"a {kind} that nvImageCodec cannot read")
    if codec == "png":
        _check_sums(image)
    decoded = codec_of_thread("Decoder").decode(stream, params=_UPRIGHT)
    if pixels is None and decoded is None:
        raise Undecodable(_DAMAGED)
    if pixels is not None and (decoded is None or _differ(decoded, pixels)):
        return _Decoded(kind, pixels, f"a {kind} that nvImageCodec and Pillow decode differently")
    return _Decoded(kind, decoded, None)


# Headers.


def _codec(encoded: bytes) -> str:
    """nvImageCodec's name of the format that the first bytes are of."""
    if not encoded:
        raise Undecodable("empty file")
    for signature, codec in _SIGNATURES.items():
        if encoded.startswith(signature):
            return codec
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "webp"
    brands = {encoded[at : at + 4] for at in range(8, min(64, int.from_bytes(encoded[:4], "big")), 4)}
    named = [name for name, of_it in _BRANDS.items() if encoded[4:8] == b"ftyp" and brands & of_it]
    named += [name for signature, name in _UNSUPPORTED.items() if encoded.startswith(signature)]
    if named:
        raise Undecodable(f"{named[0]} is not supported; convert it to JPEG or PNG")
    raise Undecodable(f"its header is not that of a supported image ({' '.join(EXTENSIONS.values())})")


def _variant(codec: str, encoded: bytes) -> str | None:
    """What the file is if DALI's pixels of such are not nvImageCodec's; Undecodable if neither's are right."""
    try:
        if codec == "jpeg":
            return _variant_of_jpeg(encoded)
        if codec == "tiff":
            return _variant_of_tiff(encoded)
        if codec == "pnm":
            return _variant_of_pnm(encoded)
    except Undecodable:
        raise
    except Exception:  # Pillow's parser raises what it meets: of structs, keys, numbers
        raise Undecodable(_DAMAGED) from None
    return None


def _variant_of_jpeg(encoded: bytes) -> str | None:
    at, adobe = 2, False
    while encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker in _FRAMES:
            if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
                return "a lossless or hierarchical JPEG"
            if (bits := encoded[at + 4]) != 8:
                return f"a {bits}-bit JPEG"
            return None if adobe or encoded[at + 9] < 4 else "a CMYK JPEG without Adobe's marker"
        adobe = adobe or (marker == 0xEE and encoded[at + 4 : at + 9] == b"Adobe")
        at += 1 if marker == 0xFF else 2 + (encoded[at + 2] << 8 | encoded[at + 3])
    raise Undecodable(_DAMAGED)


def _variant_of_pnm(encoded: bytes) -> str | None:
    """Of the greatest value, after width and height; comments may stand between them. Bitmaps have none."""
    if encoded[1:2] in (b"1", b"4"):
        return None
    tokens = re.match(rb"P\d(?:(?:\s|#[^\n\r]*[\n\r])+\d+){2}(?:\s|#[^\n\r]*[\n\r])+(\d+)", encoded)
    if tokens is None:
        raise Undecodable(_DAMAGED)
    greatest = int(tokens[1])
    return None if greatest in (255, 65535) else f"a PNM whose maximum value is {greatest}"


def _variant_of_tiff(encoded: bytes) -> str | None:
    tags = ImageFileDirectory_v2(encoded[: 16 if encoded[2] == 43 else 8])  # 43 is BigTIFF's
    with io.BytesIO(encoded) as file:
        file.seek(tags.next)
        tags.load(file)
    bits, formats = (np.atleast_1d(tags.get(tag, 1)).tolist() for tag in (_BITS, _SAMPLE_FORMAT))
    if wrong := next((_SAMPLE_FORMATS.get(each, "unknown") for each in formats if each != 1), None):
        raise Undecodable(f"a TIFF with {wrong} samples; only unsigned integers are supported")
    if max(bits) > 16:
        raise Undecodable(f"a TIFF with {max(bits)}-bit samples; at most 16 bits are supported")
    if tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0) > MOST_PIXELS:
        raise Undecodable(f"tiles of more than {MOST_PIXELS} pixels")
    samples, photometric, planar = (tags.get(tag, 1) for tag in (_SAMPLES, _PHOTOMETRIC, _PLANAR))
    if (photometric, samples, bits[0]) in _TIFF_VARIANTS and len({*bits}) == planar == 1:
        return None
    return (
        f"a TIFF of {samples} x {bits[0]} bits, photometric interpretation {photometric}{', in planes' * (planar > 1)}"
    )


def _opened(codec: str, encoded: bytes, variant: str | None) -> Image.Image:
    """Pillow's reading of the header, of a picture whose size is bounded."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=[_PILLOWS.get(codec, codec)])
        sizes = [image.size]
        if codec == "jpeg2k":  # its container has a size as well
            with Image.open(io.BytesIO(encoded[encoded.index(_CODESTREAM) :]), formats=["JPEG2000"]) as inner:
                sizes.append(inner.size)
    except Exception:
        raise Undecodable(_damaged_or(variant, codec)) from None
    pixels = max(width * height for width, height in sizes)
    if pixels > MOST_PIXELS:
        raise Undecodable(f"{pixels} pixels; at most {MOST_PIXELS} are supported")
    return image


def _damaged_or(variant: str | None, codec: str | None = None) -> str:
    unread = f"a {EXTENSIONS[codec]} that Pillow cannot read" if codec in ("bmp", "tiff", "pnm", "jpeg2k") else None
    other = variant or unread
    return f"{_DAMAGED}, or not supported: {other}" if other else _DAMAGED


def _stream(codec: str, encoded: bytes, image: Image.Image) -> Any:
    """nvImageCodec's reading of the header; None where it fails or sees something else."""
    stream = nvimgcodec.CodeStream(encoded)
    try:  # it is read when it is first asked for something
        same = stream.codec_name == codec and sorted((stream.width, stream.height)) == sorted(image.size)
        typed = str(stream.dtype) in ("uint8", "uint16") and (codec != "jpeg2k" or stream.precision in (8, 16))
    except (RuntimeError, TypeError):  # no header, or a type without a name
        return None
    return stream if same and typed else None


# Pixels.


def _differ(decoded: Any, pixels: NDArray[np.uint8]) -> bool:
    """Whether nvImageCodec's image has not Pillow's pixels to within one level."""
    if decoded.shape != pixels.shape:
        return True
    return bool(np.abs(np.asarray(decoded.cpu()).astype(np.int16) - pixels).max() > 1)


def _check_sums(png: Image.Image) -> None:
    """Of the chunks, which the decoders pass over."""
    try:
        png.verify()
    except Exception:
        raise Undecodable(_DAMAGED) from None


def _pillows_pixels(image: Image.Image, variant: str | None) -> NDArray[np.uint8]:
    """Upright RGB."""
    bits, white_is_zero = 16, False
    try:
        if isinstance(image, TiffImageFile):
            bits, white_is_zero = max(image.tag_v2.get(_BITS, [1])), image.tag_v2.get(_PHOTOMETRIC) == 0
            if not variant and image.info["compression"] != "raw":
                variant = f"a TIFF compressed as {image.info['compression']}"
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # of 9 to 16 bits, which Pillow's own convert() clips, and takes white for black
            levels = np.rint(np.asarray(image).clip(0, 2**bits - 1) * (255 / (2**bits - 1))).astype(np.uint8)
            image = Image.fromarray(255 - levels if white_is_zero else levels)
        return np.asarray(image.convert("RGB"))
    except Exception:
        raise Undecodable(_damaged_or(variant)) from None
