"""Takes all figures: `python -m benchmarks [--only KEYS] [--quick] [--check] [--save-baseline]`; `make bench` and `make bench-check`.

Uses folders of its own for machines and snapshots, so that the user's pool is neither measured nor touched.
"""

import argparse
import asyncio
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agentvm_kernel import paths
from agentvm_kernel.errors import AgentVMError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import machines_dir
from agentvm_kernel.hypervisor.reap import remove_machine
from agentvm_kernel.sandbox.sandbox import Sandbox
from agentvm_kernel.sandbox.settings import load_settings
from benchmarks import cells, harness, machines, proxy, report, starts, travel
from benchmarks.harness import Figure, Plan, Results, Table
from benchmarks.kernels import Kernels, kernels

HERE = Path(__file__).parent
LATEST = HERE / "latest.json"
BASELINE = HERE / "baseline.json"
OUT = HERE.parent / "out" / "bench"
WHOLE_S = 700.0
"""The whole run takes no longer, building a template apart."""
PREPARE_S = 360.0

Measure = Callable[[Plan, Kernels], Iterator[tuple[str, Figure | Table]]]


@dataclass(frozen=True)
class Group:
    """Figures that are taken together.

    Attributes:
        keys: of the figures.
        measure: yields each with its key as soon as it is there.
        limit_s: what it may take at most.
        machines: machines are needed for it.
    """

    keys: tuple[str, ...]
    measure: Measure
    limit_s: float
    machines: bool = True


GROUPS = (
    Group(("start_clone_ratio", "start_pool_ratio", "pool_acquire_ms"), starts.measure, 260),
    Group(("cell_ratio", "stdout_ratio"), cells.measure, 180),
    Group(("proxy_ratio", "proxy_stdout_ratio", "proxy_bulk_ratio"), proxy.measure, 90, machines=False),
    Group(("clone_pss_mib", "idle_cpu_percent", "paused_cpu_percent"), machines.measure, 90),
    Group(("snapshot_s", "restore_s"), travel.measure, 120),
    Group(("restore_vs_libvirt",), travel.measure_against_libvirt, 200),
    Group(("fork10_s",), travel.measure_forks, 110),
    Group(("snapshot_sizes",), travel.measure_sizes, 110),
)


def use_own_folders() -> None:
    """Keep what is measured apart from the user's own machines. The image cache is shared; templates stay for the next run."""
    os.environ["AGENTVM_STATE_DIR"] = f"{paths.state_dir()}-bench"
    os.environ["AGENTVM_RUN_DIR"] = f"{paths.run_dir()}-bench"


def prepare(say: Callable[[str], None]) -> float:
    """Build the template that all machines are thawed from, where there is none yet; return the seconds that it took."""
    began = time.monotonic()

    async def one() -> None:
        async with await Sandbox.create(on_progress=lambda text: say(f"  {text}")):
            pass

    say("A machine to begin with …")
    try:
        with harness.time_limit(PREPARE_S):
            asyncio.run(one())
    except (AgentVMError, TimeoutError) as error:
        say(f"  {error}")  # those figures that need machines will fail and say so
    return time.monotonic() - began


def remove_machines() -> None:
    """Remove what a figure that was given up has left; all machines in these folders are the benchmark's."""
    left = [folder.name for folder in machines_dir().iterdir() if folder.is_dir()]
    if left:
        with Hypervisor(load_settings().uri) as hypervisor:
            for name in left:
                remove_machine(hypervisor, name)


def take(groups: tuple[Group, ...], plan: Plan, say: Callable[[str], None]) -> Results:
    """Measure all groups; a figure that cannot be taken does not keep the others from it."""
    results = Results(machine=harness.machine())
    deadline = time.monotonic() + WHOLE_S
    if any(group.machines for group in groups):
        deadline += prepare(say)
    with kernels() as started:
        for group in groups:
            missing = list(group.keys)
            began = time.monotonic()
            say(f"{', '.join(group.keys)} …")
            try:
                with harness.time_limit(min(group.limit_s, deadline - began)):
                    for key, found in group.measure(plan, started):
                        missing.remove(key)
                        if isinstance(found, Table):
                            results.tables[key] = found
                        else:
                            results.figures[key] = found
                            say(f"  {key}: {found.value:.3g} {found.unit} ({found.detail})")
            except Exception as error:
                if not isinstance(error, TimeoutError):
                    traceback.print_exc()
                results.failures |= dict.fromkeys(missing, f"{type(error).__name__}: {error}")
            say(f"  took {time.monotonic() - began:.0f} s")
    if any(group.machines for group in groups):
        try:
            remove_machines()
        except AgentVMError as error:
            say(f"Machines are left in {paths.state_dir()}: {error}")
    results.machine["load_at_end"] = harness.load()
    return results


def chosen(only: str) -> tuple[Group, ...]:
    """Return the groups that hold these keys, all of them if there are none.

    Raises:
        SystemExit: a key is unknown.
    """
    wanted = {key for key in only.replace(",", " ").split() if key}
    known = {key for group in GROUPS for key in group.keys}
    if wanted - known:
        raise SystemExit(
            f"There is no figure {', '.join(sorted(wanted - known))}. Choose of: {', '.join(sorted(known))}."
        )
    return tuple(group for group in GROUPS if not wanted or wanted & set(group.keys))


def main() -> int:
    """Run from the command line; return 1 where --check finds something worse."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", metavar="KEYS", help="only these figures, by commas")
    parser.add_argument("--quick", action="store_true", help="few turns, to try things out")
    parser.add_argument("--check", action="store_true", help="fail where something got worse than the baseline")
    parser.add_argument("--save-baseline", action="store_true", help="let later runs be compared with this one")
    options = parser.parse_args()
    use_own_folders()
    results = take(
        chosen(options.only), Plan(quick=options.quick), lambda text: print(text, file=sys.stderr, flush=True)
    )

    before = harness.read_baseline(BASELINE)
    worse = harness.worse(results, before)
    OUT.mkdir(parents=True, exist_ok=True)
    text = harness.to_json(results)
    if not options.only:
        LATEST.write_text(text)
    path = OUT / f"{results.machine['taken'].replace(':', '')}.json"
    path.write_text(text)
    (OUT / "report.html").write_text(report.as_html(results, before, worse))
    print(f"\n{report.as_text(results)}\nAll runs: {path}; charts: {OUT / 'report.html'}")
    if options.save_baseline:
        BASELINE.write_text(harness.to_baseline(results))
        print(f"Later runs are compared with this one ({BASELINE}).")
    elif worse:
        print("Worse than the baseline:\n  " + "\n  ".join(worse))
    elif before:
        print("Nothing got worse than the baseline.")
    if options.check and not before:
        print(f"There is no baseline to compare with: {BASELINE}. `make bench` with BASELINE=1 makes one.")
        return 1
    return 1 if options.check and worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
