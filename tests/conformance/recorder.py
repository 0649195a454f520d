"""A pytest plugin for the suites of others: writes what became of each case to the file AGENTVM_RESULTS names, one JSON object a line."""

import json
import os
from collections.abc import Iterator

import pytest


class _Recorder:
    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A case is what its worst phase is; set-up and tear-down only count when they fail or skip.
        if report.when == "call" or report.outcome != "passed":
            self._seen[report.nodeid] = (report.outcome, _why(report))

    def pytest_sessionfinish(self) -> None:
        with open(self._path, "w") as file:
            for case, (outcome, why) in self._seen.items():
                file.write(json.dumps({"id": case, "outcome": outcome, "why": why}) + "\n")


def _why(report: pytest.TestReport) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr or "")).partition("\n")[0]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder(os.environ["AGENTVM_RESULTS"]), "agentvm-recorder")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """See to it that the suite does meet our kernel."""
    from jupyter_client.kernelspec import KernelSpecManager

    for name in ("python3", "python"):
        argv = KernelSpecManager().get_kernel_spec(name).argv
        if "agentvm_kernel" not in argv:
            pytest.exit(f"the kernel {name} is {argv}, not ours", returncode=3)
    return (yield)
