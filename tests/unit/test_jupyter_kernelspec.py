"""The kernelspec, as Jupyter's own tools see it."""

import json
import sys

import pytest
from jupyter_client.kernelspec import KernelSpecManager

from agentvm_kernel.jupyter import kernelspec


@pytest.fixture
def jupyter(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def test_installed_for_the_user_it_is_found_and_complete(jupyter):
    folder = kernelspec.install(user=True)
    assert folder == jupyter / "data" / "kernels" / "agentvm"
    spec = KernelSpecManager().get_kernel_spec("agentvm")
    assert spec.argv == [sys.executable, "-m", "agentvm_kernel", "-f", "{connection_file}"]
    assert spec.language == "python"
    assert spec.display_name == "Python 3 (agentvm)"
    assert spec.interrupt_mode == "message"
    assert spec.metadata["debugger"] is True
    assert {path.name for path in folder.iterdir()} >= {
        "kernel.json",
        "logo-32x32.png",
        "logo-64x64.png",
        "logo-svg.svg",
    }


def test_installed_again_it_replaces_the_old_one(jupyter):
    kernelspec.install(user=True, display_name="old")
    folder = kernelspec.install(user=True, display_name="new", env={"AGENTVM_PROFILE": "light"})
    values = json.loads((folder / "kernel.json").read_text())
    assert values["display_name"] == "new"
    assert values["env"] == {"AGENTVM_PROFILE": "light"}


def test_installed_under_another_name_and_prefix(jupyter):
    folder = kernelspec.install(prefix=str(jupyter / "prefix"), name="python3")
    assert folder == jupyter / "prefix" / "share" / "jupyter" / "kernels" / "python3"


def test_refuses_a_name_that_is_a_path(jupyter):
    with pytest.raises(ValueError, match="kernel name"):
        kernelspec.install(user=True, name="../evil")
