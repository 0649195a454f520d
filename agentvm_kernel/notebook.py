"""Notebook files: reading, parameters, writing. Loads nbformat, so only `agentvm run` imports it."""

import ast
import json
import keyword
import os
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from agentvm_kernel.errors import NotebookError

PARAMETERS_TAG = "parameters"
INJECTED_TAG = "injected-parameters"


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook of any format version and return it as version 4.

    Raises:
        NotebookError: it is not there, cannot be read or is not a notebook.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotebookError(f"Cannot read the notebook {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _not_a_notebook(path, "it is not text in UTF-8") from error
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise _not_a_notebook(path, f"it is not JSON, {error}") from error
    if not (isinstance(raw, dict) and isinstance(raw.get("nbformat"), int) and ("cells" in raw or "worksheets" in raw)):
        raise _not_a_notebook(path, "it has no nbformat and cells")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without an id get one
            notebook: NotebookNode = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
            nbformat.validate(notebook)
    except Exception as error:  # nbformat raises whatever its converters stumble over
        raise _not_a_notebook(path, str(error).strip().partition("\n")[0]) from error
    return notebook


def parse_parameters(assignments: Iterable[str]) -> dict[str, Any]:
    """Read `NAME=VALUE`; VALUE is a Python literal or JSON, anything else is a string.

    Raises:
        NotebookError: one is not of that form, or NAME cannot be a variable.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise NotebookError(f"The parameter {assignment!r} has no value.", hint="Write it as NAME=VALUE.")
        if not name.isidentifier() or keyword.iskeyword(name):
            raise NotebookError(f"The parameter {name!r} is not a name for a variable.")
        values[name] = _parse_value(text)
    return values


def inject_parameters(notebook: NotebookNode, values: Mapping[str, Any]) -> None:
    """Add a cell that sets variables, as papermill does: after the cell tagged `parameters`, else first.

    A cell that an earlier run injected is replaced.
    """
    if not values:
        return
    source = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = node(cell_type="code", metadata=node(tags=[INJECTED_TAG]), source=source, outputs=[], execution_count=None)
    if notebook.nbformat_minor >= 5:
        cell["id"] = uuid.uuid4().hex[:8]
    for number, old in enumerate(notebook.cells):
        if INJECTED_TAG in old.metadata.get("tags", []):
            notebook.cells[number] = cell
            return
    tagged = (n for n, old in enumerate(notebook.cells) if PARAMETERS_TAG in old.metadata.get("tags", []))
    notebook.cells.insert(next(tagged, -1) + 1, cell)


def check_writable(path: Path) -> None:
    """Find out before an hour's work whether the result can be written.

    Raises:
        NotebookError: it cannot.
    """
    if path.is_dir():
        raise NotebookError(f"Cannot write {path}: it is a folder.", hint="Name a file: -o FOLDER/NAME.ipynb")
    if _is_special(path):
        return
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        raise NotebookError(
            f"Cannot write {path}: {error.strerror}.", hint="Name another file with -o, in a folder that exists."
        ) from error


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook so that a reader finds the old file or the new one, whole.

    Raises:
        NotebookError: it cannot be written.
    """
    # A guest can print lone surrogates, which UTF-8 cannot hold.
    text: str = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    data = f"{text}\n".encode("utf-8", "replace")
    try:
        if _is_special(path):
            path.write_bytes(data)
            return
        target = path.resolve()
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            try:
                file.write(data)
                os.fchmod(file.fileno(), target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
                file.close()
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise NotebookError(f"Cannot write {path}: {error.strerror}.") from error


def node(**fields: Any) -> NotebookNode:
    """Return a part of a notebook, such as a cell or an output."""
    return NotebookNode(fields)  # type: ignore[no-untyped-call]


def _not_a_notebook(path: Path, why: str) -> NotebookError:
    return NotebookError(f"{path} is not a notebook: {why}.", hint="Name a file that Jupyter saved, NAME.ipynb.")


def _parse_value(text: str) -> Any:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
    try:
        # What is injected must read back as the same value; 1e999 and NaN do not.
        return value if ast.literal_eval(repr(value)) == value else text
    except (ValueError, SyntaxError):
        return text


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
