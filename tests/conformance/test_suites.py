"""The tests that ipykernel and nbclient have for kernels and their clients, against this kernel.

Every case passes, or is named in not_green.toml with its reason. With the runtime as a local process, which is a part of `make test`,
and with real machines, which `make conformance` adds.
"""

import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import suites
from jupyter_client.manager import KernelManager
from suites import IPYKERNEL, NBCLIENT, Result, Suite

RUNTIMES = [
    pytest.param("local", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    pytest.param("machine", marks=[pytest.mark.guest, pytest.mark.long, pytest.mark.timeout(2400)]),
]
TEMPLATE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Known:
    """A case that need not pass."""

    outcome: str
    reason: str


def known(suite: Suite, runtime: str) -> dict[str, Known]:
    """Return the cases of a suite that do not pass, by id."""
    with (Path(__file__).parent / "not_green.toml").open("rb") as file:
        entries = tomllib.load(file).get(suite.project, [])
    return {
        entry["case"]: Known(entry["outcome"], entry["reason"]) for entry in entries if runtime in entry["runtimes"]
    }


def disagreements(results: dict[str, Result], exceptions: dict[str, Known]) -> dict[str, str]:
    """Compare what happened with what is known; return what is wrong, by case."""
    problems = {case: "named in vain: there is no such case" for case in exceptions if case not in results}
    for case, result in results.items():
        expected = exceptions[case].outcome if case in exceptions else "passed"
        if result.outcome != expected and not (expected == "varies" and result.outcome in ("passed", "failed")):
            problems[case] = f"{result.outcome}, not {expected}: {result.why}"
    return problems


def run(suite: Suite, runtime: str, folder: Path) -> dict[str, Result]:
    """Run a suite; what is not as known once more, alone: some cases allow a tenth of a second for something."""
    environ = suites.environment(folder, local=runtime == "local")
    limits = {"case_timeout_s": 60 if runtime == "local" else 300, "timeout_s": 2000}
    results = suites.run(suite, environ, **limits)
    print(f"{suite.project} {suite.version}, {runtime}: {count(results)}")
    wrong = disagreements(results, known(suite, runtime))
    if again := [case for case in wrong if case in results]:
        print(f"once more: {wrong}")
        results |= suites.run(suite, environ, again, **limits)
    return results


@pytest.fixture(scope="module")
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The results with local processes, by project, to wait for: these suites wait more than they work, so they run side by side."""
    wanted = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [one["suite"] for one in wanted if one.get("runtime") == "local" and "suite" in one]
    with ThreadPoolExecutor(len(chosen)) as threads:
        yield {suite.project: threads.submit(run, suite, "local", tmp_path_factory.mktemp("suite")) for suite in chosen}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("suite", [IPYKERNEL, NBCLIENT], ids=lambda suite: suite.project)
def test_suite(suite: Suite, runtime: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if runtime == "local":
        results = request.getfixturevalue("local")[suite.project].result()
    else:
        build_template(tmp_path / "template")
        results = run(suite, runtime, tmp_path)
    assert disagreements(results, known(suite, runtime)) == {}
    assert len(results) == suite.cases


def build_template(folder: Path) -> None:
    """Run one cell, since the suites do not wait for the template that the first machine of all is made of."""
    folder.mkdir()
    suites.environment(folder, local=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("JUPYTER_PATH", str(folder))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            assert client.execute_interactive("pass", timeout=TEMPLATE_TIMEOUT_S)["content"]["status"] == "ok"
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


def count(results: dict[str, Result]) -> str:
    outcomes = [result.outcome for result in results.values()]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))


def test_what_is_not_green_is_explained() -> None:
    for suite in (IPYKERNEL, NBCLIENT):
        for runtime in ("local", "machine"):
            for case, exception in known(suite, runtime).items():
                assert exception.outcome in ("skipped", "failed", "varies"), case
                assert len(exception.reason) > 20, case


def test_a_case_that_changes_is_noticed() -> None:
    exceptions = {"a": Known("failed", ""), "b": Known("varies", ""), "gone": Known("failed", "")}
    results = {"a": Result("passed", ""), "b": Result("failed", ""), "c": Result("failed", "boom")}
    assert disagreements(results, exceptions) == {
        "gone": "named in vain: there is no such case",
        "a": "passed, not failed: ",
        "c": "failed, not passed: boom",
    }
    as_known = {"a": Result("failed", ""), "gone": Result("failed", ""), "b": Result("passed", "")}
    assert disagreements(as_known, exceptions) == {}
