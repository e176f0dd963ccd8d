"""Windows of tokens on their way to a device."""

import torch


class Feed:
    """The next `rows` windows of an order; on a GPU their copy overlaps with the computation before them."""

    def __init__(self, order, rows: int, device: torch.device):
        self.order, self.rows, self.device = order, rows, device
        self.copies = torch.cuda.Stream() if device.type == "cuda" else None
        self.staged = self.stage()

    def next(self):
        """(rows, T + 1) int64 on the device, and the (shard, offset) each row came from."""
        windows, copied, origin = self.staged
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
        self.staged = self.stage()
        return windows, origin

    def stage(self):
        windows, origin = self.order.next(self.rows)
        host = torch.from_numpy(windows)
        if self.copies is None:
            return host.to(self.device), None, origin
        with torch.cuda.stream(self.copies):
            windows, copied = host.pin_memory().to(self.device, non_blocking=True), torch.cuda.Event()
            copied.record()
        windows.record_stream(torch.cuda.current_stream())
        return windows, copied, origin

    @property
    def position(self) -> int:
        """Windows this rank has handed out; the staged ones are not among them."""
        return self.order.position - self.rows

    def go_to(self, position: int) -> None:
        self.order.position = position
        self.staged = self.stage()
