"""Several ranks in one process, of which one runs at a time: they take turns where they add up what they have."""

import threading
from concurrent.futures import ThreadPoolExecutor


class PretendedRanks:
    """Runs the same work on each of some pretended ranks.

    Attributes:
        sums: How many sums over ranks there were.
    """

    def __init__(self, count):
        self.count, self.sums = count, 0
        self._values = [None] * count
        self._met = threading.Barrier(count, timeout=60)
        self._turn = threading.Lock()  # Triton's interpreter serves one thread at a time

    def run(self, work):
        """Return `work(rank, all_sum)` of each rank."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(lambda rank: self._work(work, rank), range(self.count)))

    def _work(self, work, rank):
        with self._turn:
            try:
                return work(rank, lambda value: self._all_sum(rank, value))
            except BaseException:
                self._met.abort()
                raise

    def _all_sum(self, rank, value):
        self._values[rank] = value
        self.sums += rank == 0
        self._wait()
        total = sum(self._values[1:], self._values[0])
        self._wait()
        return total

    def _wait(self):
        self._turn.release()
        try:
            self._met.wait()
        finally:
            self._turn.acquire()
