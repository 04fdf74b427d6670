"""Runs the workloads over the variants, and what stays open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bytepath.accounts import per_connection
from bytepath.stats import Metrics, Sample, turns
from bytepath.topology import Topology
from bytepath.variants import Variant
from bytepath.workloads import Workload

_BUSY_KIB = 64


def rounds(
    topology: Topology, chosen: Sequence[Variant], workloads: Sequence[Workload], count: int
) -> Iterator[Sample]:
    """`count` rounds; in each, every workload goes over all variants before the next one begins."""
    by_name = {variant.name: variant for variant in chosen}
    for number in range(count):
        for workload in workloads:
            for name in turns(list(by_name), number):
                yield Sample(number, workload.name, name, _one(topology, by_name[name], workload))


def _one(topology: Topology, variant: Variant, workload: Workload) -> Metrics:
    before = topology.cpu(variant)
    answer = topology.order(variant, workload.verb, *workload.words)
    return workload.judge(answer, topology.cpu(variant).since(before))


def idle(topology: Topology, chosen: Sequence[Variant], count: int) -> Iterator[Sample]:
    """What the proxies hold for each of `count` connections: silent from the start, silent after they were busy, and
    when all of them have been closed."""
    for variant in chosen:
        if variant.proxies:
            yield from _idle(topology, variant, count)


def _idle(topology: Topology, variant: Variant, count: int) -> Iterator[Sample]:
    client = topology.client(variant)
    # What is made once (tunnels, arenas) is there after some.
    topology.order(variant, "hold", count // 10)
    client.order("exercise", _BUSY_KIB)
    client.order("drop")
    start = topology.settled_memory(variant)
    steps: list[tuple[str, Callable[[], object]]] = [
        (f"{count} idle", lambda: topology.order(variant, "hold", count)),
        (f"{count} idle after {_BUSY_KIB} KiB each", lambda: client.order("exercise", _BUSY_KIB)),
        (f"{count} closed", lambda: client.order("drop")),
    ]
    for name, step in steps:
        step()
        held = per_connection(topology.settled_memory(variant), start, count)
        yield Sample(0, name, variant.name, {"resident": held.resident, "anonymous": held.anonymous})
