"""Taking the items of an iterator in a thread, ahead of use."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

_Item = TypeVar("_Item")


class _End:
    """Comes after the last item, with the error that ended them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterator[_Item], most: int) -> Generator[_Item, None, None]:
    """Yield the items in order; a thread takes them, up to ``most`` ahead, and an error comes when its turn comes.

    Closing the generator waits until the thread has ended, which it does after the item that it is taking.
    """
    taken: SimpleQueue[_Item | _End] = SimpleQueue()
    room, stopped, taking = threading.Semaphore(most), threading.Event(), threading.Lock()

    def take() -> None:
        with taking:
            try:
                while room.acquire() and not stopped.is_set():
                    taken.put(next(items))
            except StopIteration:
                taken.put(_End(None))
            except BaseException as error:  # is raised in the thread that waits for the item
                taken.put(_End(error))

    thread = threading.Thread(target=take, name="prefetch", daemon=True)
    try:
        thread.start()
        while not isinstance(item := taken.get(), _End):
            room.release()
            yield item
        if item.error:
            raise item.error
    finally:
        stopped.set()
        room.release()
        with taking:  # a thread whose start was interrupted cannot be joined, but may run
            pass
        if thread.is_alive():
            thread.join()
