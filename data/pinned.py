"""Small copies between the host and a device for which the host does not wait: pinned memory, in the stream's order.

A plain `.to(device)` or `torch.tensor(..., device=...)` of pageable memory waits until a GPU has done all that was
launched before it. No stream of their own: what is computed from these few kilobytes needs no event then, and the
memory that they are copied from is kept by torch until they have arrived.
"""

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, for what is launched from now on in the thread's current stream."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class ToHost:
    """The values that a tensor has after all that was launched before, on their way to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        self._host = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def tolist(self) -> list[float]:
        """The values; the host waits until they are there, and for nothing that was launched later."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
