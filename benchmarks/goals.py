"""What is measured, and what it should reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """What a figure should reach.

    Attributes:
        about: what the figure is, in a sentence.
        limit: it should be at most this; None where it is only shown.
        at_least: it should be at least `limit` instead.
        portable: another machine's figure says something about this one's, so it is compared with the baseline.
    """

    about: str
    limit: float | None = None
    at_least: bool = False
    portable: bool = False

    def met(self, value: float) -> bool:
        """Whether `value` is good enough."""
        if self.limit is None:
            return True
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        if self.limit is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


GOALS = {
    "start_pool_ratio": Goal(
        "start_kernel to the first execute_reply with a warm pool, over a bare local ipykernel", 1.0, portable=True
    ),
    "start_clone_ratio": Goal("the same with an empty pool: a machine is thawed for it", 2.0, portable=True),
    "pool_acquire_ms": Goal("asking for a machine until a pooled one has confirmed that it is ours", 50),
    "cell_ratio": Goal(
        "round trip of a cell at the client, over the same cell asked of the same ipykernel from inside the guest",
        1.25,
        portable=True,
    ),
    "stdout_ratio": Goal("speed of printed lines, same comparison", 0.9, at_least=True, portable=True),
    "proxy_ratio": Goal(
        "round trip of a cell through the whole path with the runtime as a local process, over a bare local ipykernel",
        1.25,
        portable=True,
    ),
    "proxy_stdout_ratio": Goal("speed of printed lines, same comparison", 0.9, at_least=True, portable=True),
    "proxy_bulk_ratio": Goal("speed of text printed in pieces of a megabyte, same comparison", portable=True),
    "snapshot_s": Goal("how long the machine stands still for %snapshot, with 50 MB of data over pandas", 0.1),
    "restore_s": Goal("%restore to the next cell's reply, with 50 MB of data over pandas", 0.4),
    "restore_vs_libvirt": Goal(
        "libvirt's own revertToSnapshot to a cell's reply, over ours, same data", 2.5, at_least=True, portable=True
    ),
    "fork10_s": Goal("ten running clones of a live notebook, each having run a cell", 5),
    "clone_pss_mib": Goal("proportional memory of an idle clone with pandas loaded", 60, portable=True),
    "idle_cpu_percent": Goal("host CPU of a running clone that has nothing to do", 2, portable=True),
    "paused_cpu_percent": Goal("host CPU of a paused clone", 0, portable=True),
}
