"""Notebook files: what is refused, how parameters get in, how results are written."""

import ast
import json
import os
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvm_kernel.errors import NotebookError
from agentvm_kernel.notebook import (
    check_writable,
    inject_parameters,
    parse_parameters,
    read_notebook,
    write_notebook,
)

v4 = nbformat.v4


def notebook(*cells):
    return v4.new_notebook(cells=list(cells))


def test_a_missing_notebook_is_said_to_be_missing(tmp_path):
    with pytest.raises(NotebookError, match=r"Cannot read the notebook .*no\.ipynb: No such file"):
        read_notebook(tmp_path / "no.ipynb")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"print(1)",
        b"[]",
        b"{}",
        b'{"nbformat": 4}',
        b'{"nbformat": 4, "cells": 3}',
        b'{"nbformat": 9, "cells": []}',
    ],
)
def test_something_else_is_not_a_notebook(tmp_path, content):
    path = tmp_path / "x.ipynb"
    path.write_bytes(content)
    with pytest.raises(NotebookError, match=r"x\.ipynb is not a notebook"):
        read_notebook(path)


def test_an_old_notebook_is_converted(tmp_path):
    path = tmp_path / "old.ipynb"
    code = {"cell_type": "code", "input": "1", "outputs": [], "language": "python", "collapsed": False}
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": [code], "metadata": {}}]}
    path.write_text(json.dumps(old))
    assert [cell.source for cell in read_notebook(path).cells] == ["1"]


def test_cells_without_an_id_are_no_reason_to_complain(tmp_path, recwarn):
    path = tmp_path / "x.ipynb"
    raw = json.loads(nbformat.writes(notebook(v4.new_code_cell("1"))))
    del raw["cells"][0]["id"]
    path.write_text(json.dumps(raw))
    assert read_notebook(path).cells[0].source == "1"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1.5e3", -1500.0),
        ("[1, 'a']", [1, "a"]),
        ('{"a": null, "b": true}', {"a": None, "b": True}),
        ("True", True),
        ("true", True),
        ("null", None),
        ("'3'", "3"),
        ("hello", "hello"),
        ("", ""),
        ("a=b", "a=b"),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ("__import__('os')", "__import__('os')"),
        ("[" * 5000, "[" * 5000),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values_are_literals_or_json_or_strings(text, value):
    assert parse_parameters([f"x={text}"]) == {"x": value}


@given(st.text())
def test_whatever_the_value_it_reads_back_from_the_injected_cell(text):
    value = parse_parameters([f"x={text}"])
    book = notebook()
    inject_parameters(book, value)
    statement = ast.parse(book.cells[0].source).body[0]
    assert isinstance(statement, ast.Assign)
    assert ast.literal_eval(statement.value) == value["x"]


@pytest.mark.parametrize("assignment", ["x", "1x=1", "a b=1", "=1", "for=1", "x;import os=1"])
def test_a_parameter_needs_a_name_and_a_value(assignment):
    with pytest.raises(NotebookError, match="parameter"):
        parse_parameters([assignment])


def test_parameters_go_after_the_tagged_cell():
    tagged = v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})
    book = notebook(v4.new_markdown_cell("title"), tagged, v4.new_code_cell("x"))
    inject_parameters(book, {"x": 2})
    assert [cell.source for cell in book.cells] == ["title", "x = 1", "# Parameters\nx = 2", "x"]
    assert book.cells[2].metadata.tags == ["injected-parameters"]
    nbformat.validate(book)


def test_without_a_tagged_cell_parameters_go_first():
    book = notebook(v4.new_code_cell("x"))
    inject_parameters(book, {"x": "ü"})
    assert book.cells[0].source == "# Parameters\nx = 'ü'"


def test_parameters_of_an_earlier_run_are_replaced():
    book = notebook(v4.new_code_cell("x"))
    inject_parameters(book, {"x": 1})
    inject_parameters(book, {"x": 2})
    assert [cell.source for cell in book.cells] == ["# Parameters\nx = 2", "x"]


def test_notebooks_older_than_cell_ids_stay_valid():
    book = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": []})
    inject_parameters(book, {"x": 1})
    nbformat.validate(book)


def test_a_result_replaces_the_old_file_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "out.ipynb"
    path.write_text("old")
    path.chmod(0o640)
    write_notebook(notebook(v4.new_code_cell("ü")), path)
    assert nbformat.read(path, as_version=4).cells[0].source == "ü"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.ipynb"]


def test_a_new_result_gets_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_notebook(notebook(), tmp_path / "out.ipynb")
    finally:
        os.umask(before)
    assert (tmp_path / "out.ipynb").stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "real.ipynb").write_text("old")
    (tmp_path / "link.ipynb").symlink_to("real.ipynb")
    write_notebook(notebook(), tmp_path / "link.ipynb")
    assert (tmp_path / "link.ipynb").is_symlink()
    assert nbformat.read(tmp_path / "real.ipynb", as_version=4).cells == []


def test_lone_surrogates_of_a_guest_do_not_lose_the_notebook(tmp_path):
    output = v4.new_output("stream", name="stdout", text="a\ud800b")
    write_notebook(notebook(v4.new_code_cell("x", outputs=[output])), tmp_path / "out.ipynb")
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs[0].text == "a?b"


def test_dev_null_is_a_place_to_write_to():
    check_writable(Path("/dev/null"))
    write_notebook(notebook(), Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", [".", "missing/out.ipynb", "/proc/out.ipynb"])
def test_where_nothing_can_be_written_it_is_said_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotebookError, match="Cannot write"):
        check_writable(Path(name))
