"""What a fresh Python kernel is asked before a template is made of its machine, so that clones answer at once.

The first completion, traceback and figure each load a lot, which takes seconds, and under emulation a minute. All of it happens as
requests that no client sees, and leaves no name in the user's namespace. Standard library only.
"""

from typing import Any

Request = tuple[str, dict[str, Any]]
"""Type and content of a request on the shell channel."""

_QUIET = {"silent": True, "store_history": False, "allow_stdin": False, "stop_on_error": False}

# A cell's own source is what a traceback shows, so the error is raised in it. What a template holds is never touched by the collector
# again, or every clone would get its own copy of all those pages.
_CELL = """
def _agentvm_warm_up():
    import gc, importlib, io, sys
    shell = get_ipython()
    try:
        {}["missing"]
    except KeyError:
        shell.InteractiveTB.structured_traceback(*sys.exc_info())
    for name in ("ipywidgets", "tqdm.auto"):
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    if "matplotlib" in sys.modules:
        from matplotlib.figure import Figure
        figure = Figure()
        figure.subplots().plot([0, 1], label="x")
        figure.savefig(io.BytesIO(), format="png", bbox_inches="tight")
    if "pandas" in sys.modules:
        shell.display_formatter.format(sys.modules["pandas"].DataFrame({"x": [0.5, 1.5]}))
    gc.collect()
    gc.freeze()

try:
    _agentvm_warm_up()
finally:
    del _agentvm_warm_up
"""


def _at_end(code: str) -> dict[str, Any]:
    return {"code": code, "cursor_pos": len(code)}


RUN: Request = (
    "execute_request",
    {**_QUIET, "code": "print(get_ipython().display_formatter.format(0) and 1)", "silent": False},
)
"""Takes the way of any cell, with output, and leaves nothing behind: it is not counted, not stored, and sets no name."""

EVERYTHING: tuple[Request, ...] = (
    ("complete_request", _at_end("zi")),
    ("complete_request", _at_end("import os.path; os.path.jo")),
    ("complete_request", _at_end("In.app")),
    ("inspect_request", {**_at_end("zip"), "detail_level": 0}),
    ("is_complete_request", {"code": "def f():"}),
    ("execute_request", {"code": _CELL, **_QUIET}),
)
"""What people do in the first minute."""
