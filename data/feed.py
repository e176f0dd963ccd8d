"""Windows of tokens on their way to a device."""

from concurrent.futures import ThreadPoolExecutor

import torch


class Feed:
    """The next `rows` windows of an order, read by a thread while the device is at work; the copy waits for nobody.

    An order that follows what was learnt reads no window before its time.
    """

    def __init__(self, order, rows: int, device: torch.device, reads_ahead: bool = True):
        self.order, self.rows, self.device, self.reads_ahead = order, rows, device, reads_ahead
        self.reader, self.position, self.ahead = ThreadPoolExecutor(1), order.position, None

    def seek(self, position: int) -> None:
        """Go on from there: what was read ahead is dropped."""
        if self.ahead:
            self.ahead.result()
        self.position, self.order.position, self.ahead = position, position, None

    def dice(self):
        """A number for each row that was last given: of its place in the order, whatever the number of ranks."""
        numbers = torch.arange(self.position - self.rows, self.position, device=self.device)
        return numbers * self.order.world + self.order.rank + self.order.seed * 1_000_003

    def next(self):
        """(rows, T + 1) int64 on the device, and the (shard, offset) each row came from."""
        host, origin, self.position = self.ahead.result() if self.ahead else self.read()
        self.ahead = self.reader.submit(self.read) if self.reads_ahead else None
        return host.to(self.device, non_blocking=True), origin

    def read(self):
        windows, origin = self.order.next(self.rows)
        host = torch.from_numpy(windows)
        return host.pin_memory() if self.device.type == "cuda" else host, origin, self.order.position
