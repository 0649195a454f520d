"""Test suites of other projects: fetched as source distributions, unpacked outside the repository, run in a pytest of their own.

pip checks the archive against the digest given here. The suites start kernels by name (`python3`), so a kernelspec of that name leads
them to this kernel; nothing of them is patched.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agentvm_kernel import paths
from agentvm_kernel.jupyter import kernelspec

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """Some test files of a project.

    Attributes:
        project: its name on PyPI.
        version: of the source distribution.
        sha256: of the archive.
        files: which of its test files; those that start kernels as clients do.
        cases: how many cases these files have.
    """

    project: str
    version: str
    sha256: str
    files: tuple[str, ...]
    cases: int

    def fetch(self) -> Path:
        """Return the folder of the source distribution, downloaded on first use."""
        cache = paths.cache_dir() / "suites"
        folder = cache / f"{self.project}-{self.version}"
        if folder.is_dir():
            return folder
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
            wanted = Path(temporary) / "wanted.txt"
            wanted.write_text(f"{self.project}=={self.version} --hash=sha256:{self.sha256}\n")
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            download += ["--no-binary", self.project, "--require-hashes", "-r", str(wanted), "-d", temporary]
            subprocess.run(download, check=True, timeout=300)
            (archive,) = Path(temporary).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            (Path(temporary) / folder.name).rename(folder)
        return folder


IPYKERNEL = Suite(
    "ipykernel",
    "7.4.0",
    "4330114d22b9b33575b2c7c68753fc8faabbbcfbc60b0cdff9f14dd4ce63742f",
    ("test_message_spec.py", "test_kernel.py", "test_async.py", "test_subshells.py", "test_debugger.py"),
    97,
)
NBCLIENT = Suite(
    "nbclient",
    "0.11.0",
    "04a134a5b087f2c5887f228aca155db50169b8cd9334dee6942c8e927e56081a",
    ("test_client.py",),
    89,
)


@dataclass(frozen=True)
class Result:
    """What became of a case: passed, failed or skipped, and the last line that pytest said about it."""

    outcome: str
    why: str


def environment(folder: Path, *, local: bool) -> dict[str, str]:
    """Return variables for a process whose kernels named python3 and python are this kernel.

    Args:
        folder: an empty one, for the kernelspecs.
        local: with the runtime as a local process instead of machines.
    """
    for name in ("python3", "python"):
        target = folder / "kernels" / name
        target.parent.mkdir(exist_ok=True)
        kernelspec.write(target, name, {"AGENTVM_LOCAL_RUNTIME": "1"} if local else {})
    # Where ipykernel and its tests look for a user's profile; a kernel on this host would have made one.
    (folder / "ipython" / "profile_default").mkdir(parents=True)
    repository = HERE.parent.parent
    return os.environ | {
        "JUPYTER_PATH": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": f"{HERE}{os.pathsep}{repository}",
    }


def run(
    suite: Suite, environ: dict[str, str], cases: Sequence[str] = (), *, case_timeout_s: int, timeout_s: int
) -> dict[str, Result]:
    """Run a suite, or some of its cases, and return what became of them, by id ("test_kernel.py::test_simple_print")."""
    folder = suite.fetch()
    with tempfile.TemporaryDirectory(prefix="agentvm-suite-") as temporary:
        results = Path(temporary) / "results.jsonl"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(HERE / "suite.ini"),
            f"--rootdir={folder}",
            "-p",
            "recorder",
        ]
        command += [
            "-q",
            "--tb=short",
            f"--timeout={case_timeout_s}",
            *(f"tests/{name}" for name in cases or suite.files),
        ]
        # What they print is shown by our pytest when we fail.
        subprocess.run(
            command, cwd=folder, env=environ | {"AGENTVM_RESULTS": str(results)}, check=False, timeout=timeout_s
        )
        lines = results.read_text().splitlines() if results.exists() else []
    return {line["id"].removeprefix("tests/"): Result(line["outcome"], line["why"]) for line in map(json.loads, lines)}
