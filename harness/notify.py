"""Messages to the owner of a run, by any service that apprise knows, and the secrets that no message or log may show.

Delivery is a thread's affair: a dead or slow service costs the run nothing but the message.
"""

import logging
import queue
import re
import threading
import time
from contextlib import suppress

HIDDEN = "***"
SECRET_LENGTH = 8  # shorter pieces of a URL are words, not keys
HOST = re.compile(r"(localhost|[a-z0-9-]+(\.[a-z0-9-]+)+)$", re.I)
TRIES = 3
PAUSE = 2.0  # seconds between tries
WAITING = 100  # messages at most


class Secrets:
    """Values that must not be seen: each as a whole, and the keys within a URL."""

    def __init__(self, values: list[str]):
        pieces = {piece for value in values for piece in [value, *re.split(r"[/:@?&=#]+", value)]}
        keys = {p for p in pieces if p in values or (len(p) >= SECRET_LENGTH and not HOST.match(p))}
        self.keys = sorted(keys - {""}, key=len, reverse=True)

    def hide(self, value):
        """The same text, list or dictionary with every secret blotted out."""
        if isinstance(value, str):
            for key in self.keys:
                value = value.replace(key, HIDDEN)
            return value
        if isinstance(value, dict):
            return {self.hide(name): self.hide(v) for name, v in value.items()}
        return [self.hide(v) for v in value] if isinstance(value, list | tuple) else value


def deliver(url: str, title: str, body: str) -> str:
    """One message to one or several apprise URLs; what went wrong, or nothing."""
    try:
        from apprise import Apprise
    except ImportError:
        return "apprise is not installed: pip install 'apprise>=1.9'"
    for name in ("apprise", "urllib3"):  # they would write the URL, keys and all, to the terminal
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    service = Apprise()
    if not service.add(url):
        return "NOTIFY_URL is no address that apprise knows: see https://github.com/caronc/apprise"
    return "" if service.notify(title=title, body=body) else "the service did not take the message"


class Notifier:
    """Sends in the background, in order; `say` is told of the first failure and of what was lost at the end."""

    def __init__(self, url: str, say):
        self.url, self.say, self.failed, self.sent, self.taken = url, say, False, 0, 0
        self.waiting = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self.run, name="notifier", daemon=True)

    def send(self, title: str, body: str) -> None:
        if not self.url:
            return
        if not self.sent:
            self.thread.start()
        self.sent += 1
        with suppress(queue.Full):  # close() tells of it
            self.waiting.put_nowait((title, body))

    def run(self) -> None:
        while message := self.waiting.get():
            for left in range(TRIES - 1, -1, -1):
                trouble = deliver(self.url, *message)
                if not trouble:
                    break
                if not self.failed:
                    self.failed = True
                    self.say(f"notifier: {trouble}; the run goes on")
                time.sleep(PAUSE if left else 0)
            self.taken += not trouble

    def close(self, patience: float = 15.0) -> None:
        """Waits a little for what is under way."""
        if not self.sent:
            return
        with suppress(queue.Full):
            self.waiting.put(None, timeout=patience / 2)
            self.thread.join(patience)
        if self.taken < self.sent:
            self.say(f"notifier: {self.sent - self.taken} of {self.sent} messages were not delivered")


def fact_lines(facts: dict) -> str:
    """`name: value` lines; numbers as people read them."""
    shown = {name: f"{v:,}" if isinstance(v, int) else f"{v:.6g}" if isinstance(v, float) else v
             for name, v in facts.items() if v not in ("", None)}  # fmt: skip
    return "\n".join(f"{name}: {value}" for name, value in shown.items())
