"""Installs Python packages into a guest's root file system, with the host's pip, so that the host's settings for proxies,
certificates and indexes apply and none of them ends up in the guest.
"""

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agentvm_kernel.errors import ImageError
from agentvm_kernel.image.tools import chroot, run

PREFIX = "opt/notebook"
# What a notebook needs in any case: ipykernel runs it, and %pip install calls pip.
ALWAYS = ("ipykernel>=7", "pip")
# Any glibc up to Debian 12's 2.36 (https://peps.python.org/pep-0600/), best first.
_PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(36, 16, -1)), "manylinux2014_x86_64")
_HINT = "Check the requirements in the spec (there must be wheels for them) and the network."
_TRY_OTHERS = "Another version in the spec's requirements may help."
_ROUNDS = 5
_WARM = {
    "matplotlib": "import matplotlib.font_manager",
    # Completion: it parses the types of the standard library.
    "jedi": "import jedi\nfor code in ('zi', 'import os.path; os.path.jo', 'import re, sys, json, typing; json.du'):"
    " jedi.Interpreter(code, [{}]).complete()",
}
"""Code that fills a cache, by the package whose cache it is."""


class PythonPackages:
    """The virtual environment /opt/notebook of a guest.

    Args:
        root: the guest's root file system.
        python: the guest's Python version, such as "3.11".
        work: folder for temporary files.
        user: id and home folder of the user to whom the environment belongs.
    """

    def __init__(self, root: Path, python: str, work: Path, *, user: tuple[int, str]) -> None:
        self.root = root
        self.python = python
        self.work = work
        self.user = user
        self.prefix = root / PREFIX
        self.site = self.prefix / f"lib/python{python}/site-packages"

    def make_environment(self) -> None:
        """Make an empty virtual environment that belongs to the user."""
        self.prefix.mkdir()
        self._give_to_user()
        chroot(self.root, ["python3", "-m", "venv", "--without-pip", f"/{PREFIX}"], _TRY_OTHERS, user=self.user)

    def install(self, requirements: Sequence[str], on_progress: Callable[[float, str], None]) -> None:
        """Install requirements and what they need.

        Args:
            requirements: as in PEP 508, without markers and addresses.
            on_progress: called with the part that is done (0 to 1) and pip's words.

        Raises:
            ImageError: something cannot be installed, or does not fit together.
        """
        seen = 0

        def on_line(line: str) -> None:
            nonlocal seen
            seen += line.startswith(("Collecting", "Installing"))
            on_progress(0.9 * (1 - 0.96**seen), line)

        wanted = [*ALWAYS, *requirements]
        options: list[str] = []
        for _ in range(_ROUNDS):
            self._pip(wanted, options, on_line)
            on_progress(0.95, "checking that everything is there")
            check = [f"/{PREFIX}/bin/python3", "-m", "pip", "check"]
            said = chroot(self.root, check, _TRY_OTHERS, user=self.user, accept=(0, 1))
            if "No broken requirements found" in said:
                return
            # pip decides with the host's Python what a package needs (https://github.com/pypa/pip/issues/11664),
            # so a guest with another version can lack something, which the guest's own pip notices.
            missing = re.findall(r"requires ([A-Za-z0-9._-]+), which is not installed", said)
            if not missing:
                break
            wanted, options = sorted(set(missing)), ["--no-deps"]
        raise ImageError(f"The guest's Python packages do not fit together: {said}.", hint=_TRY_OTHERS)

    def compile(self) -> None:
        """Compile everything to byte code with the guest's Python; without it the first start takes three times as long.

        By time stamp, not by hash: a checked hash makes every import read the source too. Some packages carry files that
        are not meant for this Python; those are left alone.

        Raises:
            ImageError: more than those few could not be compiled.
        """
        site = f"/{PREFIX}/lib/python{self.python}/site-packages"
        command = ["python3", "-I", "-S", "-m", "compileall", "-q", "-j0", "--invalidation-mode=timestamp", site]
        said = chroot(self.root, command, _TRY_OTHERS, user=self.user, accept=(0, 1))
        compiled, sources = (sum(1 for _ in self.site.rglob(pattern)) for pattern in ("*.pyc", "*.py"))
        if compiled < 0.95 * sources:
            raise ImageError(f"Only {compiled} of {sources} Python files could be compiled: {said}", hint=_TRY_OTHERS)

    def warm(self) -> None:
        """Let packages fill caches in the user's home that would cost seconds at the first start."""
        for package, code in _WARM.items():
            if (self.site / package).is_dir():
                chroot(self.root, [f"/{PREFIX}/bin/python3", "-c", code], _TRY_OTHERS, user=self.user)

    def _pip(self, wanted: Sequence[str], options: Sequence[str], on_line: Callable[[str], None]) -> None:
        run(
            [
                sys.executable, "-m", "pip", "install", "--target", str(self.site), "--python-version", self.python,
                "--implementation", "cp", *(part for name in _PLATFORMS for part in ("--platform", name)),
                "--only-binary=:all:", "--no-compile", "--disable-pip-version-check", "--root-user-action=ignore",
                "--progress-bar=off", "--no-input", *options, *wanted,
            ],
            cwd=self.work, name="pip", hint=_HINT, on_line=on_line, environment={"TMPDIR": str(self.work)},
        )  # fmt: skip
        self._move_scripts_and_data()
        self._give_to_user()

    def _move_scripts_and_data(self) -> None:
        """Move what belongs into the prefix, since pip's --target puts everything into one folder."""
        for name in ("bin", "etc", "share"):
            if (self.site / name).is_dir() and not (self.site / name / "__init__.py").exists():
                shutil.copytree(self.site / name, self.prefix / name, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(self.site / name)
        interpreter = f"#!/{PREFIX}/bin/python3\n".encode()
        for script in (self.prefix / "bin").iterdir():
            if not script.is_symlink():
                script.write_bytes(re.sub(rb"\A#!.*python.*\n", interpreter, script.read_bytes()))
        # The lists of installed files, so that uninstalling in the guest finds them. A home folder's packages lie one
        # level less deep (https://packaging.python.org/en/latest/specifications/recording-installed-packages/).
        for record in self.site.glob("*.dist-info/RECORD"):
            text = record.read_text()
            record.write_text(re.sub(r"^(\"?)\.\./\.\./(?=(bin|etc|share)/)", r"\1../../../", text, flags=re.MULTILINE))

    def _give_to_user(self) -> None:
        owner = str(self.user[0])
        chroot(self.root, ["chown", "-hR", f"{owner}:{owner}", f"/{PREFIX}"], _TRY_OTHERS)
