"""jupyter_kernel_test, Jupyter's own suite for kernels, against this kernel as clients start it: by its kernelspec.

Once with the runtime as a local process, and with `-m guest` once with a real machine.
"""

import os

import jupyter_kernel_test
import pytest
from jupyter_client.manager import start_new_kernel

from agentvm_kernel.jupyter import kernelspec

REAL_MACHINE_TIMEOUT_S = 600


class PythonKernelTests(jupyter_kernel_test.KernelTests):
    """What the suite asks of a Python kernel."""

    __test__ = False

    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('as asked')"
    code_execute_result = [
        {"code": "6 * 7", "result": "42"},
        {"code": "'a' + 'b'", "result": "'ab'"},
        {"code": "from IPython.display import HTML; HTML('<b>x</b>')", "mime": "text/html", "result": "<b>x</b>"},
    ]
    code_display_data = [
        {"code": "from IPython.display import display, HTML; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "from IPython.display import display, Math; display(Math('\\\\frac{1}{2}'))", "mime": "text/latex"},
    ]
    completion_samples = [
        {"text": "zi", "matches": {"zip"}},
        {"text": "import itertools; itertools.chai", "matches": {"chain"}},
    ]
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n", "class A:\n  pass\n\n"]
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2", "if True:"]
    invalid_code_samples = ["import = 7q", "x = )"]
    code_history_pattern = "6 * 7*"
    # Not "range": IPython answers with session 0 where the suite expects the number, with and without us.
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; print('x'); clear_output()"

    @classmethod
    def setUpClass(cls):
        cls.km, cls.kc = start_new_kernel(
            kernel_name=cls.kernel_name, startup_timeout=60, env={**os.environ, "IPYTHONDIR": cls.ipython_dir}
        )
        # A cold boot takes longer than the suite waits for a reply.
        cls.kc.execute_interactive("", timeout=REAL_MACHINE_TIMEOUT_S)


class WelcomeTests(jupyter_kernel_test.IopubWelcomeTests):
    """Clients are welcomed on iopub (JEP 65)."""

    __test__ = False

    support_iopub_welcome = True


@pytest.fixture(autouse=True, scope="class")
def kernel(request, tmp_path_factory):
    """Install the kernelspec, pointed at the backend that the class asks for."""
    folder = tmp_path_factory.mktemp("jupyter")
    request.cls.ipython_dir = str(folder / "ipython")
    kernelspec.write(folder / "kernels" / "agentvm", "agentvm", request.cls.kernel_env)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("JUPYTER_PATH", str(folder))
        yield


class TestLocalRuntime(PythonKernelTests):
    """With the runtime as a process of this host."""

    __test__ = True
    kernel_name = "agentvm"
    kernel_env = {"AGENTVM_LOCAL_RUNTIME": "1"}


class TestLocalRuntimeWelcome(WelcomeTests):
    """With the runtime as a process of this host."""

    __test__ = True
    kernel_name = "agentvm"
    kernel_env = {"AGENTVM_LOCAL_RUNTIME": "1"}


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestRealMachine(PythonKernelTests):
    """With a virtual machine."""

    __test__ = True
    kernel_name = "agentvm"
    kernel_env = {}


@pytest.mark.guest
class TestRealMachineWelcome(WelcomeTests):
    """With a virtual machine, which need not be there for that."""

    __test__ = True
    kernel_name = "agentvm"
    kernel_env = {}
