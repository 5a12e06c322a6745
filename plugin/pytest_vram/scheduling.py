"""Which xdist worker runs which case: the next in the order of the sweep goes to the first that is free."""

from typing import Any

from xdist.scheduler import LoadScheduling

AHEAD = 2  # an xdist worker begins a test when it knows the next one


class CaseScheduling(LoadScheduling):  # type: ignore[misc]
    """Two tests at a time for each xdist worker, of which it begins the second when it has ended the first.

    So that none waits behind a long case while a GPU is idle, an xdist worker for which no test is left is given one
    that waits for another, too; whoever comes to it first claims it.
    """

    node2pending: dict[Any, list[int]]
    collection: list[str] | None

    def schedule(self) -> None:
        """Hand out the first tests, or to an xdist worker that was started later its first."""
        if self.collection is None:
            if not self._check_nodes_have_same_collection():
                return
            self.collection = next(iter(self.node2collection.values()))
            self.pending[:] = range(len(self.collection))
            for node in self.nodes:
                self._send_tests(node, 1)
        for node in self.nodes:
            self.check_schedule(node)

    def check_schedule(self, node: Any, duration: float = 0) -> None:
        """Have the xdist worker know its next test, or that there is none."""
        queue = self.node2pending[node]
        while len(queue) < AHEAD and not node.shutting_down:
            if not self.pending:
                waiting = (index for other in self.node2pending.values() for index in other[1:])
                index = next((index for index in waiting if index not in queue), None)
                if index is None:
                    node.shutdown()
                    return
                self.pending.append(index)
            self._send_tests(node, 1)

    def remove_node(self, node: Any) -> str | None:
        """Take back what an xdist worker has left; gives the test that it was running, if it was running one."""
        queue = self.node2pending[node]
        elsewhere = {index for other in self.node2pending if other is not node for index in self.node2pending[other]}
        queue[1:] = [index for index in queue[1:] if index not in elsewhere]
        crashed: str | None = super().remove_node(node)
        return crashed
