"""Encoded images and their AugmentParams in, pixels out, in order: one DALI graph, on the CPU or on a GPU.

    bytes -> decode the crop (upright) -> resize, antialiased bilinear -> flip -> RandAugment, layer by layer

The pixels of a sample are a function of its bytes and its row of the parameters: batch size, neighbours, order, threads
and how far DALI runs ahead change nothing. That holds within one device and DALI version; a GPU decodes JPEG with
another codec, a few levels off. The bytes must be known to decode and the crop to lie in the image: on others
DALI's decoder can end the process, and no error is raised. Variants that DALI would read otherwise become PNGs
(codec.plain). Bilinear rather than bicubic: it is cheaper and does
not overshoot. Normalisation is the model's.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorCPU, TensorListCPU, TensorListGPU
from nvidia.dali.types import DALIDataType, DALIImageType

from data.augment import AugmentParams
from data.codec import plain
from data.errors import DataError
from data.memory import AHEAD, DECODED_BYTES
from data.randaugment import FILL, Family, Tables, tables


class DecodingFailed(DataError):
    """DALI failed on a batch, for `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"DALI failed on a batch: {reason}")
        self.reason = reason


Source = Callable[[], tuple[Sequence[bytes], AugmentParams]]


class Decoder:
    """An iterator of uint8 [n, resolution, resolution, 3], RGB, on the device: a tensor for each answer of `source`.

    `source` returns the encoded images (from 0 to `batch_size` of them) with AugmentParams of
    `layers` layers, or raises StopIteration; it is called in the iterating thread, a batch ahead. Its other errors are
    raised as they are, a batch early. DecodingFailed if DALI fails; after any error the decoder gives that error only.
    A batch is decoded in several runs of DALI where its crops take more than DECODED_BYTES, `ahead` runs at a time.
    Tensors are the caller's: later batches do not touch them. Threads are DALI's own and end with the decoder.
    """

    def __init__(
        self,
        *,
        resolution: int,
        batch_size: int,
        layers: int,
        magnitude: float,
        device: Literal["cpu", "gpu"],
        device_id: int | None,
        threads: int,
        source: Source,
        ahead: int = AHEAD,
    ) -> None:
        if device == "gpu" and device_id is None:
            device_id = torch.cuda.current_device()
        table = tables(magnitude, resolution)
        self._feed = _Feed(source, layers, table)
        self._end: BaseException | None = None
        self._stream = torch.cuda.Stream(device_id) if device == "gpu" else None
        # The executor is left at DALI's default: the older one hands out memory that later batches overwrite.
        self._pipeline: Pipeline | None = pipeline_def(_graph)(
            feed=self._feed,
            resolution=resolution,
            layers=layers,
            tones=table.tones.tolist(),
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id if device == "gpu" else None,
            prefetch_queue_depth=ahead,
            enable_conditionals=layers > 0,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        if self._end is not None:
            raise self._end
        if self._pipeline is None:
            raise StopIteration
        parts, is_last = [], False
        while not is_last:
            try:
                (pixels,) = self._pipeline.run()
            except StopIteration:
                raise
            except BaseException as error:
                # The pipeline must not run again after an error: that can end the process.
                if error is self._feed.error:
                    self._end = error
                    raise
                self._end = DecodingFailed(_reason_of(error))
                raise self._end from error
            samples, is_last, _ = self._feed.fed.popleft()
            parts.append(self._taken(pixels)[:samples])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _taken(self, pixels: TensorListCPU | TensorListGPU) -> torch.Tensor:
        """The pixels of a run as torch's; a GPU's are copied.

        DALI frees memory that was shared after a wait for the whole GPU, in a thread of its own. torch uses this again
        when the stream that trains has passed its last use, which it knows by an event.
        """
        if self._stream is None:
            return torch.from_dlpack(pixels.as_tensor())
        from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            images = to_torch_tensor(pixels.as_tensor(), copy=True)
        self._stream.synchronize()
        images.record_stream(torch.cuda.default_stream(self._stream.device))
        return images

    def close(self) -> None:
        """Ends DALI's threads; batches already handed out stay valid, and iteration is over."""
        self._pipeline = None


class _Feed:
    """What DALI calls for a run: the source's answer, or the next part of one, as the inputs of the graph.

    Apart from the decoder, so that the two and the pipeline are no cycle and go with the last reference.
    """

    def __init__(self, source: Source, layers: int, table: Tables) -> None:
        self._source, self._layers, self._table = source, layers, table
        self._parts: deque[tuple[Sequence[bytes], AugmentParams]] = deque()
        self.fed: deque[tuple[int, bool, list[TensorListCPU]]] = deque()
        """Of each run that DALI has: its samples, whether they are the last of an answer, its inputs."""
        self.error: BaseException | None = None

    def __call__(self) -> list[TensorListCPU]:
        """Bytes, crop, flip, and four numbers of the operation in each layer."""
        if not self._parts:
            try:
                images, params = self._source()
            except BaseException as error:
                self.error = error
                raise
            sizes = 3 * params.crop_shape.prod(axis=1, dtype=np.int64)
            self._parts.extend((images[part], params[part]) for part in parts_within(sizes, DECODED_BYTES))
        images, params = self._parts.popleft()
        samples, table = len(images), self._table
        if not images:
            images, params = _empty_batch(self._layers)
        numbers = [params.crop_start, params.crop_shape, params.flip]
        for layer in range(self._layers):
            operation, sign = params.operations[:, layer], params.signs[:, layer]
            numbers += [each[operation, sign] for each in (table.family, table.matrix, table.factor, table.tone)]
        encoded = TensorListCPU([TensorCPU(plain(image)) for image in images], contiguous=False)
        # DALI takes these without a copy, which it would make with the interpreter's lock held. To drop an image's last
        # reference it needs that lock too, so they are kept here until the batch is done.
        self.fed.append((samples, not self._parts, [encoded, *map(TensorListCPU, numbers)]))
        return self.fed[-1][2]


def parts_within(sizes: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Consecutive parts of images of these sizes, each as long as it can be with `most` in all, or of one image."""
    ends, first = np.cumsum(sizes), 0
    while first == 0 or first < len(sizes):
        before = ends[first] - sizes[first] if len(sizes) else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(first, last)
        first = last


def _empty_batch(layers: int) -> tuple[list[bytes], AugmentParams]:
    """One whole pixel instead of an empty batch, which DALI refuses."""
    nothing = np.zeros((1, layers), np.int32)
    corner = np.zeros((1, 2), np.int32)
    params = AugmentParams(corner, corner + 1, corner[:, 0], operations=nothing, signs=nothing)
    return [b"P6 1 1 255 \0\0\0"], params


def _graph(feed: _Feed, resolution: int, layers: int, tones: list[int]) -> DataNode:
    of_layer = [DALIDataType.INT32, DALIDataType.FLOAT, DALIDataType.FLOAT, DALIDataType.INT16]
    inputs: Sequence[DataNode] = fn.external_source(
        source=feed,
        num_outputs=4 + 4 * layers,
        batch=True,
        no_copy=True,
        dtype=[DALIDataType.UINT8, *[DALIDataType.INT32] * 3, *of_layer * layers],
        ndim=[1, 1, 1, 0, *[0, 2, 0, 0] * layers],
    )
    encoded, start, shape, flip = inputs[:4]
    decoder = "cpu" if Pipeline.current().device_id is None else "mixed"
    image = fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], device=decoder)
    image = fn.resize_crop_mirror(image, size=[resolution, resolution], mirror=flip)
    for layer in range(layers):
        image = _operation(image, inputs[4 + 4 * layer : 8 + 4 * layer], tones, resolution**2)
    return image


def _operation(image: DataNode, numbers: Sequence[DataNode], tones: list[int], pixels: int) -> DataNode:
    """One operation for each sample. Every `if` splits the batch, and costs about as much as an operator."""
    family, matrix, factor, tone = numbers
    if family == int(Family.WARP):
        # Not warp_affine: the same map, several times slower on the CPU.
        image = fn.experimental.warp_perspective(image, matrix=matrix, fill_value=FILL)
    elif family == int(Family.TONE):
        index = image + _on_device_of(image, tone)
        image = fn.lookup_table(index, keys=list(range(len(tones))), values=tones, dtype=DALIDataType.UINT8)
    elif family == int(Family.FILTER):
        image = fn.filter(image, _on_device_of(image, matrix))
    elif family == int(Family.COLOR):
        image = fn.saturation(image, saturation=factor)
    elif family == int(Family.CONTRAST):
        image = _contrast(image, _on_device_of(image, factor), pixels)
    elif family == int(Family.AUTO_CONTRAST):
        image = _auto_contrast(image)
    else:
        image = fn.equalize(image)
    return image


def _contrast(image: DataNode, factor: DataNode, pixels: int) -> DataNode:
    """The image drawn to its mean grey or away from it."""
    grey = fn.color_space_conversion(image, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY)
    # A sum of integers is exact in any order, so the mean does not depend on how a device cuts up the batch.
    mean = fn.reductions.sum(grey) * (1 / pixels)
    return fn.cast_like((image - mean) * factor + mean, image)


def _auto_contrast(image: DataNode) -> DataNode:
    """Each channel stretched to 0 .. 255; a channel of one value stays."""
    low = fn.reductions.min(image, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(image, axis_names="HW", keep_dims=True)
    flat = high == low
    return fn.cast_like((image - low) * (255 / (high - low + flat)) + low * flat, image)


def _on_device_of(image: DataNode, number: DataNode) -> DataNode:
    """The number on the image's device."""
    return number.gpu() if image.device == "gpu" else number


def _reason_of(error: BaseException) -> str:
    """DALI's reason, one line out of twenty."""
    reason = str(error).rpartition("encountered:")[2]
    for after in ("C++ context", "Current pipeline object"):
        reason = reason.partition(after)[0]
    return " ".join(reason.split())
