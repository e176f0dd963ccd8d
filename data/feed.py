"""Windows of tokens on their way to a device."""

import torch


class Feed:
    """The next `rows` windows of an order; on a GPU the copy waits for nobody: it is queued behind what is at work."""

    def __init__(self, order, rows: int, device: torch.device):
        self.order, self.rows, self.device = order, rows, device

    def next(self):
        """(rows, T + 1) int64 on the device, and the (shard, offset) each row came from."""
        windows, origin = self.order.next(self.rows)
        host = torch.from_numpy(windows)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True), origin
