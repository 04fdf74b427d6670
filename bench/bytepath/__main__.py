"""The byte path beside no mesh and an Envoy sidecar pair: throughput, round trips, connections, CPU and memory.

Two nodes are made of namespaces, with the real undermesh on them. In each round every workload goes over all variants
before the next workload begins, so that a busy machine slows all of them down. Judge the ratios, not the figures.

    make bench                                   # a look: three rounds
    make bench ARGS='--rounds 7 --report rows.jsonl --plot bench.png --idle 10000'
    make bench ARGS='--only bulk --variants none,undermesh --scale 4'
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bytepath import measure, table, workloads
from bytepath.stats import Sample, Samples
from bytepath.topology import ReleaseBuild, Topology, running
from bytepath.variants import Variant


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, default=Path("build"), help="the build directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="how much each workload does, beside the default")
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--variants", default="", help="names, with commas between; default: all")
    parser.add_argument("--idle", type=int, default=1000, help="connections that are held open; 0: none")
    parser.add_argument("--report", type=Path, help="every measurement, as JSON lines")
    parser.add_argument("--plot", type=Path, help="bars as PNG; needs requirements-bench.txt")
    arguments = parser.parse_args(argv)

    collected: list[Sample] = []
    with running(ReleaseBuild(arguments.build.absolute())) as topology:
        chosen = _chosen(topology, arguments.variants)
        for variant in chosen:
            if (lane := topology.lane(variant)) is not None:
                print(f"{variant.name}: lane {lane}")
        wanted = [one for one in workloads.all_of(arguments.scale) if arguments.only in one.name]
        for sample in measure.rounds(topology, chosen, wanted, arguments.rounds):
            collected.append(sample)
            if sys.stderr.isatty():
                print(f"\rround {sample.round + 1}: {sample.workload:<40}", end="", file=sys.stderr, flush=True)
        if arguments.idle:
            collected += measure.idle(topology, chosen, arguments.idle)
    print(file=sys.stderr)
    _tell(collected, chosen, arguments.rounds)
    if arguments.report is not None:
        arguments.report.write_text("".join(json.dumps(sample.as_json()) + "\n" for sample in collected))
    if arguments.plot is not None:
        from bytepath.plot import plot

        plot(Samples(collected), workloads.UNITS, arguments.plot)


def _chosen(topology: Topology, names: str) -> list[Variant]:
    wanted = names.split(",") if names else [variant.name for variant in topology.variants]
    known = {variant.name: variant for variant in topology.variants}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise SystemExit(f"no variant is called {', '.join(missing)}; there are: {', '.join(known)}")
    return [known[name] for name in wanted]


def _tell(collected: Sequence[Sample], chosen: Sequence[Variant], rounds: int) -> None:
    samples = Samples(collected)
    names = {variant.name for variant in chosen}
    bases = {variant.name: [base for base in variant.bases if base in names] for variant in chosen}
    print(f"{rounds} rounds, {os.cpu_count()} CPUs. Medians:\n\n{table.absolute(samples, workloads.UNITS)}")
    print(f"\nRatios, medians of the rounds (lowest-highest):\n\n{table.ratios(samples, workloads.UNITS, bases)}")


if __name__ == "__main__":
    main(sys.argv[1:])
