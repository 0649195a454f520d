"""Cells are cut at host magics of the top level, and nowhere else."""

import subprocess
import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from proxy_world import World

from agentvm_kernel.jupyter.magics.names import CELL_MAGICS, HOST_MAGICS, LINE_MAGICS, mentions
from agentvm_kernel.jupyter.magics.split import ALREADY_RUN, Code, HostMagic, split
from guest_runtime import kernel_launcher


def shape(cell):
    """The parts of a cell: a magic as (name, line), the text of code without the lines that only count."""
    return [
        (part.name, part.line) if isinstance(part, HostMagic) else part.text.removeprefix(ALREADY_RUN).lstrip("\n")
        for part in split(cell)
    ]


def test_the_guest_knows_the_same_names():
    assert set(kernel_launcher.HOST_LINE_MAGICS) == LINE_MAGICS
    assert set(kernel_launcher.HOST_CELL_MAGICS) == CELL_MAGICS


def test_code_and_magics_keep_their_order():
    cell = "x = 1\n%snapshot a\n\n# then\ny = 2\n%restore a\n%vm status\nx"
    assert shape(cell) == [
        "x = 1\n",
        ("snapshot", "a"),
        "# then\ny = 2\n",
        ("restore", "a"),
        ("vm", "status"),
        "x\n",
    ]


@pytest.mark.parametrize(
    ("cell", "magic"),
    [
        ("%snapshot", HostMagic("snapshot", "", "%snapshot\n")),
        ("  %snapshot a\n", HostMagic("snapshot", "a", "%snapshot a\n")),
        ("\n\n%restore  x  # back", HostMagic("restore", " x  # back", "%restore  x  # back\n")),
        ("%snapshot a \\\n  -d b\n", HostMagic("snapshot", "a    -d b", "%snapshot a \\\n  -d b\n")),
        (
            "%%fork 3\nx = FORK\n%snapshot a\n",
            HostMagic("fork", "3", "%%fork 3\nx = FORK\n%snapshot a\n", "x = FORK\n%snapshot a\n"),
        ),
        ("%%fork 3", HostMagic("fork", "3", "%%fork 3\n", "")),
        ("%snapshot?", HostMagic("snapshot", "", "%snapshot?\n", wants_help=True)),
        ("?%%fork", HostMagic("fork", "", "?%%fork\n", wants_help=True)),
        ("%%fork?\n", HostMagic("fork", "", "%%fork?\n", wants_help=True)),
        (">>> %snapshot a", HostMagic("snapshot", "a", "%snapshot a\n")),
        ("In [3]: %snapshot a", HostMagic("snapshot", "a", "%snapshot a\n")),
    ],
)
def test_a_cell_of_one_magic(cell, magic):
    assert split(cell) == [magic]


@pytest.mark.parametrize(
    "cell",
    [
        "x = '''\n%snapshot a\n'''",
        "# %snapshot a",
        'print("""\n%restore a\n""")',
        "f'''\n%vm {x}\n'''",
        "for i in range(3):\n    %snapshot a",
        "def f():\n    %restore a",
        "if x:\n    %undo",
        "x = %snapshot a",
        "x = 1; %snapshot a",
        "%time %snapshot a",
        "%%time\n%snapshot a",
        "%%bash\n%snapshot a",
        "!echo %snapshot a",
        "!echo \\\n%snapshot a",
        "y = (1\n%vm\n)",
        "%snapshots a",
        "%%snapshots a\n",
        "%load_ext snapshot",
        "x %vm",
        "get_ipython().run_line_magic('snapshot', 'a'); x = 1  # %snapshot",
        "%snapshot a\nthis is no python",
        "%snapshot a\n\0",
        "%snap*?",
    ],
)
def test_what_only_looks_like_one_is_the_guests(cell):
    assert split(cell) == []


def test_tracebacks_count_the_lines_above():
    *_, code = split("x = 1\n\n%snapshot a\n\ny = (\n  1/0)\n")
    assert isinstance(code, Code)
    assert code.text.split("\n").index("  1/0)") == 5


def test_form_feeds_and_other_separators_in_strings_do_not_shift_anything():
    assert shape("a = 'x\x0cy\u2028z\x1c'\n%snapshot a\nb = 1\n") == [
        "a = 'x\x0cy\u2028z\x1c'\n",
        ("snapshot", "a"),
        "b = 1\n",
    ]


@pytest.mark.filterwarnings("error")
def test_odd_code_warns_nobody_here():
    assert shape("x = '\\d'\nif x is 1: pass\n%vm\n") == ["x = '\\d'\nif x is 1: pass\n", ("vm", "")]


def test_carriage_returns_end_lines_too():
    assert shape("a = 1\r\n%snapshot a\r\nb = 2\r\n") == ["a = 1\r\n", ("snapshot", "a"), "b = 2\r\n"]


# ---- generated cells

HARMLESS = st.sampled_from(
    [
        "x = 1",
        "print('%snapshot a')",
        "# %restore a",
        "for i in range(3):\n    y = i  # %undo",
        "def f(a, b=2):\n    '''%vm'''\n    return a % b",
        "s = '''\n%snapshot a\n  %restore b\n'''",
        "!ls -l",
        "%timeit -n1 pass",
        "z = %time x",
        "x?",
        "await g()",
        "x %= 3",
        "t = (1,\n     2)",
        "if x:\n    %snapshot inner",
        "",
        "   ",
        "@dec\nclass A:\n    pass",
    ]
)
MAGIC_LINES = st.builds(
    lambda name, words: (name, " ".join(words)),
    st.sampled_from(sorted(LINE_MAGICS)),
    st.lists(st.sampled_from(["a", "b-1", "--list", "-d", "'two words'", "3"]), max_size=3),
)


@given(st.lists(st.one_of(HARMLESS, MAGIC_LINES), max_size=8))
def test_generated_cells_are_cut_exactly_at_their_magics(pieces):
    lines = [piece if isinstance(piece, str) else f"%{piece[0]} {piece[1]}".rstrip() for piece in pieces]
    assume(not lines or not lines[0].startswith(" "))
    parts = split("\n".join(lines))
    magics = [piece for piece in pieces if isinstance(piece, tuple)]
    assert [(part.name, part.line) for part in parts if isinstance(part, HostMagic)] == magics
    if magics:
        # No line is lost, moved, or run twice.
        code = [
            line
            for part in parts
            if isinstance(part, Code)
            for line in part.text.removeprefix(ALREADY_RUN).split("\n")
            if line.strip() and not line.startswith("#")
        ]
        wanted = [
            line
            for piece in pieces
            if isinstance(piece, str)
            for line in piece.split("\n")
            if line.strip() and not line.startswith("#")
        ]
        assert code == wanted


@given(st.lists(HARMLESS, max_size=8))
def test_cells_without_host_magics_reach_the_guest_byte_for_byte(pieces):
    world = World().attach()
    world.owner.plan_cell = lambda code: split(code) or None
    message = world.client.msg("execute_request", content={"code": "\n".join(pieces), "allow_stdin": False})
    frames = world.client.serialize(message, ident=[b"client"])
    world.proxy.on_client_message("shell", frames)
    ((_, parts),) = world.guest.received
    assert parts == frames[-4:]
    assert not world.owner.cells


@given(st.text(max_size=200))
@example("%")
@example("%snapshot")
@example("'''\n%snapshot")
@example("%snapshot\\")
@example("?%snapshot?")
@example("%%fork\\\n")
@example("\x0c%vm")
def test_any_text_is_split_without_an_error_and_only_where_it_mentions_a_magic(text):
    if split(text):
        assert mentions(text)


@given(st.text(alphabet=st.sampled_from(list("%snapfork vm\n\\'\"#()=:;?!\t\r\x0c1x")), max_size=60))
def test_short_cells_of_risky_characters(text):
    for part in split(text):
        assert not isinstance(part, HostMagic) or part.name in HOST_MAGICS


@given(st.text(alphabet=st.characters(exclude_characters="%")))
def test_without_a_percent_sign_nothing_is_looked_at(text):
    assert not mentions(text)


@pytest.mark.parametrize("name", sorted(HOST_MAGICS))
def test_mentions(name):
    sign = "%%" if name in CELL_MAGICS else "%"
    assert mentions(f"x\n{sign}{name}")
    assert mentions(f"'{sign}{name}'")
    assert not mentions(f"{sign}{name}s")
    assert not mentions(f"{sign} {name}")
    assert not mentions(name)


def test_looking_for_a_mention_does_not_import_ipython():
    program = (
        "import sys; from agentvm_kernel.jupyter import kernel_app; from agentvm_kernel.jupyter.magics.names import mentions;"
        "mentions('%snapshot a'); print([name for name in sys.modules if name.startswith('IPython')])"
    )
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"
