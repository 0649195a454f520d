"""Settings from files and environment, and the limits of the host's owner."""

from pathlib import Path

import pytest

from agentvm_kernel import config
from agentvm_kernel.errors import ConfigError
from agentvm_kernel.sandbox.settings import CellLimits


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The owner's and the user's file, neither of which exists yet; no settings in the environment."""
    for name in (*config.ENVIRONMENT, "AGENTVM_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    owner, user = tmp_path / "owner.toml", tmp_path / "home" / "agentvm" / "config.toml"
    user.parent.mkdir(parents=True)
    monkeypatch.setattr(config, "OWNER_CONFIG", owner)
    return owner, user


def test_without_files_and_variables_there_are_defaults(files):
    settings = config.load_config().sandbox_settings()
    assert (settings.profile, settings.image, settings.uri) == ("standard", "default", None)


def test_the_later_wins_owner_user_environment_command_line(files, monkeypatch):
    owner, user = files
    owner.write_text('uri = "test:///owner"\nimage = "owner"\nprofile = "light"\nboot_timeout_s = 1\n')
    user.write_text('image = "user"\nprofile = "intensive"\nboot_timeout_s = 2\n')
    monkeypatch.setenv("AGENTVM_BOOT_TIMEOUT", "3")
    monkeypatch.setenv("AGENTVM_PROFILE", "light")
    settings = config.load_config(profile="standard", image=None).sandbox_settings()
    assert settings.uri == "test:///owner"
    assert settings.image == "user"
    assert settings.boot_timeout_s == 3
    assert settings.profile == "standard"


def test_a_user_narrows_the_owners_limits_and_cannot_widen_them(files):
    owner, user = files
    owner.write_text('[limits]\nprofiles = ["light", "standard"]\nmax_memory_mib = 2048\n')
    user.write_text('[limits]\nprofiles = ["light", "intensive"]\nmax_memory_mib = 100000\n')
    limits = config.load_config().limits
    assert limits.profiles == {"light"}
    assert limits.max_memory_mib == 2048


def test_a_profile_that_is_not_allowed_is_refused(files):
    files[0].write_text('[limits]\nprofiles = ["light"]\n')
    with pytest.raises(ConfigError, match=r"'standard' is not allowed .* Choose one of: light\."):
        config.load_config().sandbox_settings()
    assert config.load_config(profile="light").sandbox_settings().profile == "light"


def test_a_profile_with_more_memory_than_allowed_is_refused(files):
    files[0].write_text("[limits]\nmax_memory_mib = 1000\n")
    with pytest.raises(ConfigError, match="has 1024 MiB of memory; this host allows 1000 MiB"):
        config.load_config().sandbox_settings()


def test_an_unknown_profile_names_those_that_exist(files):
    with pytest.raises(ConfigError, match=r"no profile 'huge'.* light, standard, intensive"):
        config.load_config(profile="huge").sandbox_settings()


def test_a_variable_that_is_wrong_is_called_by_its_name(files, monkeypatch):
    monkeypatch.setenv("AGENTVM_BOOT_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match=r"AGENTVM_BOOT_TIMEOUT: .*number"):
        config.load_config()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("colour = 'red'", "colour: Extra inputs"),
        ("profile = ", "not valid TOML"),
        ("[limits]\nprofiles = []", "profiles: .*at least 1"),
        ("boot_timeout_s = 0", "boot_timeout_s: .*greater than 0"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_where(files, text, problem):
    files[1].write_text(text)
    with pytest.raises(ConfigError, match=problem):
        config.load_config()


def test_a_file_that_was_named_must_exist(files, monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTVM_CONFIG", str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError, match=r"missing\.toml: No such file"):
        config.load_config()


def test_cells_are_limited_as_the_user_wants_and_the_owner_allows(files, monkeypatch):
    owner, user = files
    owner.write_text("[limits]\nmax_cell_timeout_s = 600\nmax_output_bytes = 1000\nmax_forks = 4\n")
    settings = config.load_config().sandbox_settings()
    assert settings.cells == CellLimits(timeout_s=600, output_bytes=1000, max_timeout_s=600, max_output_bytes=1000)
    assert settings.max_forks == 4
    user.write_text("cell_timeout_s = 60\noutput_cap_bytes = 5000\n[limits]\nmax_forks = 16\n")
    settings = config.load_config().sandbox_settings()
    assert (settings.cells.timeout_s, settings.cells.output_bytes, settings.max_forks) == (60, 1000, 4)
    monkeypatch.setenv("AGENTVM_CELL_TIMEOUT", "5")
    assert config.load_config().sandbox_settings().cells.timeout_s == 5


def test_without_settings_cells_are_not_limited(files):
    assert config.load_config().sandbox_settings().cells == CellLimits()
