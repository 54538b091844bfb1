"""What a forwarder waits for: one thread, one epoll, a few timers.

asyncio would cost each of these processes some MiB more, and its TLS a third of the rate (docs/tunnel.md).
"""

import heapq
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT


class Timer:
    """Something to be done once; `cancel` before that is enough."""

    __slots__ = ("_action", "at_s")

    def __init__(self, at_s: float, action: Callable[[], None]) -> None:
        self.at_s = at_s
        self._action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self._action = None

    def fire(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()

    def __lt__(self, other: "Timer") -> bool:
        return self.at_s < other.at_s


class Loop:
    """Calls back what waits in it. A handler may be called once more than there is news: all sockets must not block."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[], object]]] = {}
        self._timers: list[Timer] = []
        self._due: deque[Callable[[], None]] = deque()
        self._ended = False
        self._woken, self._wakes = socket.socketpair()
        for end in (self._woken, self._wakes):
            end.setblocking(False)
        self.watch(self._woken.fileno(), READ, lambda: self._woken.recv(4096))

    def watch(self, fd: int, events: int, handler: Callable[[], object]) -> None:
        """Call `handler` at each of `events`, and when the connection breaks; instead of what was watched before.

        Without events a connection that breaks is not told of either: whoever waits for nothing could do nothing.
        """
        before = self._watched.get(fd)
        if not events:
            self.forget(fd)
        elif before is None:
            self._epoll.register(fd, events)
        elif before[0] != events:
            self._epoll.modify(fd, events)
        if events:
            self._watched[fd] = (events, handler)

    def forget(self, fd: int) -> None:
        """Before `fd` is closed."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        timer = Timer(time.monotonic() + delay_s, action)
        heapq.heappush(self._timers, timer)
        return timer

    def soon(self, action: Callable[[], None]) -> None:
        self._due.append(action)

    def on_signal(self, number: signal.Signals, action: Callable[[], None]) -> None:
        signal.signal(number, lambda *_: self.soon(action))
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)

    def end(self) -> None:
        self._ended = True

    def run(self) -> None:
        """Return after `end` has been called."""
        while not self._ended:
            for fd, _ in self._epoll.poll(self._patience_s()):
                watched = self._watched.get(fd)
                if watched is not None:  # else one of those before it has just closed it
                    watched[1]()
            now_s = time.monotonic()
            while self._timers and self._timers[0].at_s <= now_s:
                heapq.heappop(self._timers).fire()
            for _ in range(len(self._due)):
                self._due.popleft()()

    def _patience_s(self) -> float:
        if self._due:
            return 0.0
        return max(0.0, self._timers[0].at_s - time.monotonic()) if self._timers else -1.0
