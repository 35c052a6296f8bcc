"""Small image files of every format and variant, of drawn pixels: by Pillow, or byte by byte where it writes no such.

`kept`, `converted` and `left_out` are the table: what packing does with each, and the pixels that training must see.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

HEIGHT, WIDTH = 21, 30
"""No multiples of 8 or 16, so that rows and blocks have padding."""


def smooth(channels: int) -> NDArray[np.uint8]:
    """Waves that lossy codecs keep well, every channel another, from 0 to 255."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / 20
    waves = [np.sin(x * (1 + k) + 2 * y * (3 - k) / 3 + k) for k in range(channels)]
    return np.rint(127.5 + 127.5 * np.dstack(waves)).astype(np.uint8)


def noise(channels: int, highest: int = 255) -> NDArray[np.int64]:
    """Every value from 0 to `highest`, the extremes for certain."""
    values = np.random.default_rng(channels).integers(0, highest + 1, (HEIGHT, WIDTH, channels))
    values[0, 0], values[-1, -1] = 0, highest
    return values


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def picture(mode: str, waves: bool = False) -> Image.Image:
    if mode in ("1", "P"):
        return picture("RGB", True).convert(mode)
    values = (smooth if waves else noise)(len(Image.new(mode, (1, 1)).getbands())).astype(np.uint8)
    return Image.fromarray(values.squeeze(), mode=mode)


# PNG


def png(
    samples: NDArray[Any], bits: int, color: int, interlaced: bool = False, chunks: Iterable[tuple[bytes, bytes]] = ()
) -> bytes:
    """`color` is 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; `chunks` come before the pixels."""
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [samples[y::down, x::right] for y, x, down, right in adam7] if interlaced else [samples]
    rows = [b"\0" + row for each in passes if each.size for row in packed_rows(each, bits)]
    contents = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in contents]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def packed_rows(samples: NDArray[Any], bits: int, order: str = ">") -> list[bytes]:
    """Rows of samples of any bits, each padded to whole bytes."""
    rows = samples.reshape(len(samples), -1)
    if bits % 8 == 0:
        return [row.astype(f"{order}u{bits // 8}").tobytes() for row in rows]
    shifts = np.arange(bits - 1, -1, -1)
    return [np.packbits((row[:, None] >> shifts & 1).astype(np.uint8)).tobytes() for row in rows]


# TIFF

Tags = dict[int, Sequence[int]]


def tiff(
    samples: NDArray[Any],
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    kind: int = 1,
    big: bool = False,
    planar: bool = False,
    tile: int = 0,
    compression: int = 1,
    tags: Tags | None = None,
) -> bytes:
    """Of one strip or of tiles; `kind` is the sample format: 1 unsigned, 2 signed, 3 floating; 8 is deflate."""
    height, width, bands = samples.shape
    planes = [samples[:, :, k : k + 1] for k in range(bands)] if planar else [samples]
    blocks = [p for plane in planes for p in (tiles(plane, tile) if tile else [plane])]
    if kind == 3:
        chunks = [block.astype(f"{order}f{bits // 8}").tobytes() for block in blocks]
    else:
        chunks = [b"".join(packed_rows(block, bits, order)) for block in blocks]
    if compression == 8:
        chunks = [zlib.compress(chunk) for chunk in chunks]
    fields: Tags = {
        256: [width],
        257: [height],
        258: [bits] * bands,
        259: [compression],
        262: [photometric],
        277: [bands],
        284: [2 if planar else 1],
        339: [kind] * bands,
    }
    where, sizes = (324, 325) if tile else (273, 279)
    fields |= {322: [tile], 323: [tile]} if tile else {278: [height]}
    fields |= {where: [0] * len(chunks), sizes: list(map(len, chunks)), **(tags or {})}
    for _ in range(2):  # where the chunks lie is known once the directory has been laid out
        head = directory(fields, order, big)
        ends = len(head) + np.cumsum([0, *map(len, chunks)])
        fields[where] = ends[:-1].tolist()
    return head + b"".join(chunks)


def tiles(plane: NDArray[Any], side: int) -> list[NDArray[Any]]:
    padded = np.pad(plane, ((0, -plane.shape[0] % side), (0, -plane.shape[1] % side), (0, 0)))
    return [
        padded[y : y + side, x : x + side] for y in range(0, len(padded), side) for x in range(0, padded.shape[1], side)
    ]


def directory(fields: Tags, order: str, big: bool) -> bytes:
    """The TIFF's header and its one directory, all values as SHORT or LONG."""
    count, offset, room = ("Q", "Q", 8) if big else ("I", "I", 4)
    mark = {"<": b"II", ">": b"MM"}[order]
    head = mark + (struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8))
    begin = len(head) + (8 if big else 2) + (20 if big else 12) * len(fields) + room
    table, more = struct.pack(order + ("Q" if big else "H"), len(fields)), b""
    for tag, values in sorted(fields.items()):
        long = tag in (273, 279, 324, 325)
        raw = struct.pack(f"{order}{len(values)}{'I' if long else 'H'}", *values)
        table += struct.pack(order + "HH" + count, tag, 4 if long else 3, len(values))
        table += raw.ljust(room, b"\0") if len(raw) <= room else struct.pack(order + offset, begin + len(more))
        more += raw if len(raw) > room else b""
    return head + table + bytes(room) + more


# BMP and PNM


def bmp(
    rows: Sequence[bytes],
    bits: int,
    *,
    compression: int = 0,
    palette: bytes = b"",
    masks: bytes = b"",
    top_down: bool = False,
    core: bool = False,
) -> bytes:
    """`rows` from top to bottom, unpadded; `masks` follow the header of 40 bytes."""
    padded = [row.ljust(-(-len(row) // 4) * 4, b"\0") for row in rows]
    contents = b"".join(padded if top_down else reversed(padded)) if compression in (0, 3) else b"".join(rows)
    colors = len(palette) // 4
    if core:
        info = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
        palette = b"".join(palette[i : i + 3] for i in range(0, len(palette), 4))
    else:
        height = -HEIGHT if top_down else HEIGHT
        info = struct.pack(
            "<IiiHHIIiiII", 40, WIDTH, height, 1, bits, compression, len(contents), 2835, 2835, colors, 0
        )
    begin = 14 + len(info) + len(masks) + len(palette)
    return b"BM" + struct.pack("<IHHI", begin + len(contents), 0, 0, begin) + info + masks + palette + contents


def pnm(kind: int, highest: int, comment: bytes = b"") -> bytes:
    """P1 to P6; P1 and P4 have no maximum, and 1 is black."""
    samples = noise(3 if kind % 3 == 0 else 1, highest)
    head = b"P%d\n%s%d %d\n" % (kind, comment, WIDTH, HEIGHT) + (b"%d\n" % highest if kind % 3 != 1 else b"")
    if kind <= 3:
        return head + b"\n".join(b" ".join(b"%d" % value for value in row.ravel()) for row in samples) + b"\n"
    return head + b"".join(packed_rows(samples, 1 if kind == 4 else 8 if highest < 256 else 16))


# JPEG


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:at] + jpeg[at + 16 :]


def with_transform(jpeg: bytes, transform: int) -> bytes:
    """Adobe's marker says how colours are stored: 0 as they are, 1 YCbCr, 2 YCCK."""
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe") + 15
    return jpeg[:at] + bytes([transform]) + jpeg[at + 1 :]


def with_frame(jpeg: bytes, marker: int, bits: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 1
    return jpeg[:at] + bytes([marker]) + jpeg[at + 1 : at + 3] + bytes([bits]) + jpeg[at + 4 :]


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


# The table.


class Variant(NamedTuple):
    """A file; its pixels, RGB [height, width, 3], to within `tolerance` levels; why it is left out if it is."""

    encoded: bytes
    pixels: NDArray[np.uint8]
    tolerance: int = 0
    reason: str = ""


Named = Iterator[tuple[str, Variant]]
HUGE = 20_000
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def as_pillow(encoded: bytes, tolerance: int = 0) -> Variant:
    """As Pillow shows it: profiles are not applied, alpha is dropped, and it is upright."""
    with warnings.catch_warnings(action="ignore"):  # of palettes with alpha
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    return Variant(encoded, np.array(image), tolerance)


def as_levels(encoded: bytes, samples: NDArray[Any], highest: int, tolerance: int = 0) -> Variant:
    """Grey or RGB of any depth, scaled to 255: Pillow clips what is deeper than 8 bits."""
    levels = np.rint(samples[:, :, :3] * (255 / highest)).astype(np.uint8)
    return Variant(encoded, np.repeat(levels, 3 // levels.shape[2], axis=2), tolerance)


def kept(everything: bool) -> Named:
    """Those that keep their bytes, since DALI decodes them rightly."""
    yield from _kept_jpegs(everything)
    yield from _kept_pngs(everything)
    for mode, (name, options) in product(("RGB", "RGBA", "L") if everything else ("RGBA",), _webps(everything).items()):
        yield f"webp {mode} {name}", as_pillow(file_of(picture(mode, True), "WEBP", **options), 1)
    for orientation in range(1, 9):
        exif = {"exif": exif_of(orientation)}
        yield f"jpeg turned {orientation}", as_pillow(file_of(picture("RGB", True), "JPEG", **exif), 1)
        yield f"png turned {orientation}", as_pillow(file_of(picture("RGB"), "PNG", **exif))
        yield f"webp turned {orientation}", as_pillow(file_of(picture("RGB", True), "WEBP", quality=80, **exif), 1)
        yield f"tiff turned {orientation}", as_pillow(tiff(noise(3), 8, 2, tags={274: [orientation]}))
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"bmp {mode}", as_pillow(file_of(picture(mode), "BMP"))
    for bits, top_down, core in product((1, 4, 8, 24, 32), (False, True), (False, True)):
        if not core or (not top_down and bits != 32):
            yield f"bmp {bits} bits {'from the top' * top_down}{'core' * core}", as_pillow(_bmp(bits, top_down, core))
    yield from _kept_tiffs(everything)
    for mode, (name, options) in product(("L", "RGB", "RGBA"), _jpeg2ks(everything).items()):
        yield f"jpeg2k {mode} {name}", as_pillow(file_of(picture(mode, True), "JPEG2000", **options), 1)
    deep = noise(1, 65535)
    yield "jpeg2k 16", as_levels(file_of(Image.fromarray(deep.astype("<u2")[:, :, 0]), "JPEG2000"), deep, 65535, 1)
    for kind, highest in ((5, 255), (6, 255), (5, 65535), (6, 65535)):
        yield f"pnm P{kind} {highest}", _pnm(kind, highest, b"# made by hand\n")
    yield "pnm P4", as_pillow(pnm(4, 1))


def converted(everything: bool) -> Named:
    """Those of which packing makes a PNG."""
    inks = file_of(picture("CMYK", True), "JPEG", quality=95)
    yield "jpeg CMYK without Adobe's marker", as_pillow(without_adobe(inks))
    yield (
        "webp that nvImageCodec's parser refuses",
        as_pillow(file_of(picture("RGB", True), "WEBP", lossless=True, exif=exif_of(6))),
    )
    for mode, masks in (("555", b""), ("565", struct.pack("<III", 0xF800, 0x7E0, 0x1F))):
        yield f"bmp {mode}", as_pillow(bmp(_high_colour(mode), 16, compression=3 if masks else 0, masks=masks))
    yield "bmp rle4", as_pillow(_rle4())
    for bits, order in product((8, 16), "<>") if everything else ((8, "<"), (16, ">")):
        planes = tiff(noise(3, 2**bits - 1), bits, 2, planar=True, order=order)
        yield f"tiff RGB {bits} planes {order}", as_pillow(planes, bits // 16)
    for extra in (0, 2):
        yield f"tiff grey and alpha {extra}", as_pillow(tiff(noise(2), 8, 1, tags={338: [extra]}))
    yield "tiff grey and alpha all white", as_pillow(tiff(np.full((HEIGHT, WIDTH, 2), 255), 8, 1, tags={338: [2]}))
    yield "tiff associated alpha", as_pillow(tiff(noise(4), 8, 2, tags={338: [1]}))
    yield "tiff five bands", as_pillow(tiff(noise(5), 8, 2, tags={338: [0, 0]}))
    for bits, photometric, order in product((2, 4), (0, 1), "<>"):
        yield (
            f"tiff {bits} bits {photometric} {order}",
            as_pillow(tiff(noise(1, 2**bits - 1), bits, photometric, order=order)),
        )
    deep = noise(1, 4095)
    yield "tiff 12 bits", as_levels(tiff(deep, 12, 1), deep, 4095)
    deep = noise(1, 65535)
    for compression in (1, 8):
        encoded = tiff(deep, 16, 0, compression=compression)
        yield f"tiff 16 bits, white is zero, {compression}", as_levels(encoded, 65535 - deep, 65535)
    for mode, compression in product(
        ("LAB", "PA", "LA"), ("tiff_lzw", "packbits", "zstd") if everything else ("zstd",)
    ):
        yield f"tiff {mode} {compression}", as_pillow(file_of(picture(mode, True), "TIFF", compression=compression))
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK") if everything else ("RGB",):
        yield f"tiff {mode} lzma", as_pillow(file_of(picture(mode, True), "TIFF", compression="lzma"))
    for mode, options in (("L", {"no_jp2": True}), ("LA", {}), ("YCbCr", {})):
        yield f"jpeg2k {mode} {list(options)}", as_pillow(file_of(picture(mode, True), "JPEG2000", **options), 1)
    for kind, highest in product((2, 3, 5, 6), (1, 2, 15, 100, 256, 1023, 4095) if everything else (15, 4095)):
        if kind > 3 or highest > 255:  # nvImageCodec scales the ASCII ones of 8 bits rightly
            yield f"pnm P{kind} {highest}", _pnm(kind, highest)
    yield "pnm without a last line end", as_pillow(pnm(2, 255)[:-1])


def left_out() -> Named:
    """Those that nobody decodes rightly, by their reasons."""
    coloured, tif = file_of(picture("RGB", True), "JPEG"), file_of(picture("RGB"), "TIFF")
    maybe = "cannot be decoded: truncated or damaged, or not supported: "
    files: dict[str, tuple[bytes, str]] = {
        "jpeg 12 bits": (with_frame(coloured, 0xC0, 12), maybe + "a 12-bit JPEG"),
        "jpeg lossless": (with_frame(coloured, 0xC3, 8), maybe + "a lossless or hierarchical JPEG"),
        "jpeg cut": (coloured[: len(coloured) // 2], "cannot be decoded: truncated or damaged"),
        "tiff cut": (tif[: len(tif) // 2], "cannot be decoded: truncated or damaged"),
        "bmp other masks": (
            _bmp(32, masks=struct.pack("<III", 0xFF, 0xFF00, 0xFF0000)),
            maybe + "a bmp that Pillow cannot",
        ),
        "html": (b"<!DOCTYPE html><title>404 Not Found</title>", "its header is not that of a supported image"),
        "zeros": (bytes(5000), "its header is not that of a supported image"),
        "empty": (b"", "empty file"),
        "avif": (file_of(picture("RGB", True), "AVIF"), "AVIF is not supported"),
        "heic": (struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC is not supported"),
        "gif": (file_of(picture("P"), "GIF"), "GIF is not supported"),
        "ico": (file_of(picture("RGB"), "ICO"), "ICO is not supported"),
        "tiff big and big-endian": (
            tiff(noise(1), 8, 1, order=">", big=True),
            "BigTIFF of this byte order is not supported",
        ),
        "pfm": (b"Pf\n2 1\n-1.0\n" + bytes(8), "PFM is not supported"),
        "tiles of 12 GB": (
            tiff(noise(3), 8, 2, tile=16, tags={322: [65520], 323: [65520]}),
            "tiles of more than 268435456",
        ),
    }
    for part in (3, 2, 20):
        cut = file_of(picture("RGB"), "PNG")
        files[f"png cut at 1/{part}"] = cut[: len(cut) // part], "cannot be decoded: truncated or damaged"
    for kind, encoded in _said_to_be_huge().items():
        files[f"{kind} said to be huge"] = encoded, f"{HUGE**2} pixels; at most 268435456"
    wrong = {
        (2, 8): "signed",
        (2, 16): "signed",
        (2, 32): "signed",
        (3, 16): "floating",
        (3, 32): "floating",
        (1, 32): "32-bit",
    }
    for ((kind, bits), word), bands, order in product(wrong.items(), (1, 3), "<>"):
        encoded = tiff(noise(bands, 100), bits, 1 if bands == 1 else 2, kind=kind, order=order)
        files[f"tiff {word} {bits} x {bands} {order}"] = encoded, f"a TIFF with {word}.* samples"
    for bits, bands in ((1, 3), (4, 3), (16, 2)):
        encoded = tiff(noise(bands, 2**bits - 1), bits, bands - 1)
        files[f"tiff {bands} x {bits}"] = encoded, f"{maybe}a TIFF of {bands} x {bits} bits"
    for name, (encoded, reason) in files.items():
        yield name, Variant(encoded, np.empty(0, np.uint8), 0, reason)


def _said_to_be_huge() -> dict[str, bytes]:
    """A few bytes each; of JPEG 2000 only the codestream says so, the container does not."""
    words, halves = struct.pack(">II", HUGE, HUGE), struct.pack(">HH", HUGE, HUGE)
    jpeg, portable = file_of(picture("RGB"), "JPEG"), png(noise(1), 8, 0)
    head = b"IHDR" + words + portable[24:29]
    siz = file_of(picture("RGB"), "JPEG2000")
    at = siz.index(b"\xff\x4f\xff\x51") + 8
    return {
        "jpeg": jpeg.replace(struct.pack(">HH", HEIGHT, WIDTH), halves, 1),
        "png": portable[:12] + head + struct.pack(">I", zlib.crc32(head)) + portable[33:],
        "bmp": _bmp(24).replace(struct.pack("<ii", WIDTH, HEIGHT), struct.pack("<ii", HUGE, HUGE), 1),
        "tiff": tiff(noise(3), 8, 2, tags={256: [HUGE], 257: [HUGE]}),
        "pnm": b"P6 %d %d 255 " % (HUGE, HUGE) + bytes(99),
        "jpeg2k": siz[:at] + words + siz[at + 8 :],
    }


def _kept_jpegs(everything: bool) -> Named:
    options: dict[str, dict[str, Any]] = {
        "plain": {}, "progressive": {"progressive": True}, "optimised": {"optimize": True}, "rough": {"quality": 20},
        "restarts": {"restart_marker_blocks": 2}, "profile": {"icc_profile": PROFILE},
        **{name: {"subsampling": name} for name in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")},
    }  # fmt: skip
    for mode, (name, more) in product(("L", "RGB", "CMYK"), options.items()):
        if everything or mode == "RGB" or name in ("plain", "progressive"):
            yield f"jpeg {mode} {name}", as_pillow(file_of(picture(mode, True), "JPEG", **more), 1)
    coloured, inks = (file_of(picture(mode, True), "JPEG") for mode in ("RGB", "CMYK"))
    plain = file_of(picture("RGB", True), "JPEG", keep_rgb=True)
    yield "jpeg RGB", as_pillow(plain, 1)
    yield "jpeg RGB by its components' names", as_pillow(without_adobe(plain), 1)
    yield "jpeg RGB said to be YCbCr", as_pillow(with_transform(plain, 1), 1)
    yield "jpeg YCCK", as_pillow(with_transform(inks, 2), 1)
    yield "jpeg without JFIF", as_pillow(coloured[:2] + coloured[20:], 1)
    yield "jpeg and garbage", as_pillow(coloured + b"garbage" * 9, 1)
    yield "jpeg of two", as_pillow(file_of(picture("RGB", True), "MPO", save_all=True, append_images=[picture("L")]), 1)


def _kept_pngs(everything: bool) -> Named:
    palette = noise(3).astype(np.uint8).reshape(-1, 3)
    for color, channels, depths in (
        (0, 1, (1, 2, 4, 8, 16)),
        (2, 3, (8, 16)),
        (3, 1, (1, 2, 4, 8)),
        (4, 2, (8, 16)),
        (6, 4, (8, 16)),
    ):
        for bits, interlaced, transparent in product(depths, (False, True), (False, True)):
            chunks = [(b"PLTE", palette[: 2**bits].tobytes())] if color == 3 else []
            if transparent and color < 4:
                chunks.append((b"tRNS", {0: b"\0\1", 2: b"\0\1" * 3, 3: b"\0\x80"}[color]))
            elif transparent:
                continue
            samples = noise(channels, 2**bits - 1)
            encoded = png(samples, bits, color, interlaced, chunks)
            deep = (
                as_levels(encoded, samples[:, :, : 1 if color == 4 else 3], 65535, 1)
                if bits == 16
                else as_pillow(encoded)
            )
            yield f"png {color} {bits} {'interlaced' * interlaced}{' transparent' * transparent}", deep
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA") if everything else ("RGB",):
        yield f"png {mode} profile", as_pillow(file_of(picture(mode), "PNG", icc_profile=PROFILE))
    yield "png gamma", as_pillow(png(noise(3), 8, 2, chunks=[(b"gAMA", struct.pack(">I", 100_000))]))
    yield "png animated", as_pillow(file_of(picture("RGB"), "PNG", save_all=True, append_images=[picture("RGB", True)]))
    yield "png and garbage", as_pillow(png(noise(3), 8, 2) + b"garbage" * 9)


def _webps(everything: bool) -> dict[str, dict[str, Any]]:
    animated = {"save_all": True, "append_images": [picture("RGB")]}
    options: dict[str, dict[str, Any]] = {"lossless": {"lossless": True}, "lossy": {"quality": 80}}
    options["animated"] = {"lossless": True, **animated}
    return options if not everything else {**options, "profile": {"icc_profile": PROFILE}, "lossy, animated": animated}


def _jpeg2ks(everything: bool) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {"lossless": {}, "lossy": {"irreversible": True, "quality_layers": [10]}}
    return options if not everything else {**options, "tiles": {"tile_size": (16, 16)}, "no transform": {"mct": 0}}


def _kept_tiffs(everything: bool) -> Named:
    both, orders = (False, True), "<>" if everything else "<"
    for mode, compression in product(
        ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"),
        (None, "tiff_lzw", "jpeg", "zstd", "tiff_adobe_deflate", "packbits"),
    ):
        drawn = (mode == "1" and compression in (None, "jpeg")) or (mode == "P" and compression == "jpeg")
        if not drawn and (everything or compression in ("tiff_lzw", "jpeg")):
            yield (
                f"tiff {mode} {compression}",
                as_pillow(file_of(picture(mode, True), "TIFF", compression=compression), 1),
            )
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield f"tiff fax {compression}", as_pillow(file_of(picture("1"), "TIFF", compression=compression))
    for order, big, tile, compression in product("<>", both, (0, 16), (1, 8)):
        if big and order == ">":  # Pillow reads none
            continue
        layout: dict[str, Any] = {"order": order, "big": big, "tile": tile, "compression": compression}
        name = f"{order}{' big' * big}{' tiles' * (tile > 0)} {compression}"
        for bits in (8, 16):
            samples = noise(3, 2**bits - 1)
            yield (
                f"tiff RGB {bits} {name}",
                as_levels(tiff(samples, bits, 2, **layout), samples, 2**bits - 1, bits // 16),
            )
        if everything or (big, tile) == (False, 0):
            deep = noise(1, 65535)
            yield f"tiff grey 16 {name}", as_levels(tiff(deep, 16, 1, **layout), deep, 65535, 1)
            yield f"tiff grey 8 {name}", as_pillow(tiff(noise(1), 8, 1, **layout))
    for bits, photometric, order in product((1, 8), (0, 1), orders):
        yield (
            f"tiff {bits} bits {photometric} {order}",
            as_pillow(tiff(noise(1, 2**bits - 1), bits, photometric, order=order)),
        )
    for extra, bits, order in product((0, 2), (8, 16), orders):
        samples = noise(4, 2**bits - 1)
        yield (
            f"tiff alpha {extra} {bits} {order}",
            as_levels(tiff(samples, bits, 2, order=order, tags={338: [extra]}), samples, 2**bits - 1, bits // 16),
        )
    for bits, order in product((1, 2, 4, 8), orders):
        colors = (257 * noise(3).reshape(-1)[: 3 * 2**bits]).tolist()
        yield (
            f"tiff palette {bits} {order}",
            as_pillow(tiff(noise(1, 2**bits - 1), bits, 3, order=order, tags={320: colors}), 1),
        )
    yield "tiff of two pages", as_pillow(file_of(picture("RGB"), "TIFF", save_all=True, append_images=[picture("L")]))
    yield "tiff profile", as_pillow(file_of(picture("RGB"), "TIFF", icc_profile=PROFILE))
    yield "tiff predictor", as_pillow(tiff(noise(3), 8, 2, compression=8, tags={317: [2]}))


def _pnm(kind: int, highest: int, comment: bytes = b"") -> Variant:
    return as_levels(pnm(kind, highest, comment), noise(3 if kind % 3 == 0 else 1, highest), highest, 1)


def _bmp(bits: int, top_down: bool = False, core: bool = False, masks: bytes = b"") -> bytes:
    colors = noise(3).reshape(-1, 3)[: 2**bits if bits <= 8 else 0].astype(np.uint8)
    palette = b"".join(bytes([blue, green, red, 0]) for red, green, blue in colors.tolist())
    samples = noise(1, 2**bits - 1) if bits <= 8 else noise(bits // 8)
    rows = packed_rows(samples, min(bits, 8))
    return bmp(rows, bits, compression=3 if masks else 0, palette=palette, masks=masks, top_down=top_down, core=core)


def _high_colour(mode: str) -> list[bytes]:
    red, green, blue = (int(bits) for bits in mode)
    pixels = noise(3)
    values = (
        (pixels[..., 0] >> 8 - red << green + blue) | (pixels[..., 1] >> 8 - green << blue) | pixels[..., 2] >> 8 - blue
    )
    return [row.astype("<u2").tobytes() for row in values]


def _rle4() -> bytes:
    """Runs of one pixel, from the last row up; 0 0 ends a row, 0 1 the picture."""
    rows = [b"".join(bytes([1, value << 4]) for value in row.ravel().tolist()) for row in noise(1, 15)[::-1]]
    grey = b"".join(bytes([17 * level, 17 * level, 17 * level, 0]) for level in range(16))
    return bmp([b"\0\0".join(rows) + b"\0\1"], 4, compression=2, palette=grey)
