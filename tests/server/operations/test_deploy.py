"""The deploy files say what the command line takes, and open one port."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from silotune.common.cli.main import silotune
from silotune.server.operations import service

DEPLOY = Path(__file__).parents[3] / "server" / "deploy"
UNIT = DEPLOY / "silotune-server.service"


def settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def parses(words: list[str]) -> str:
    """The name of the command that takes the words; click's error if none does."""
    program, noun, verb, *rest = words
    assert Path(program).name == "silotune"
    nouns = silotune.get_command(click.Context(silotune), noun)
    assert isinstance(nouns, click.Group)
    command = nouns.get_command(click.Context(nouns), verb)
    assert command is not None
    command.make_context(verb, rest)
    return f"silotune {noun} {verb}"


def test_the_unit_and_compose_run_a_command_that_exists() -> None:
    (command,) = settings()["ExecStart"]
    assert parses(shlex.split(command)) == "silotune server start"
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert parses(server["command"]) == "silotune server start"
    with pytest.raises(click.UsageError):
        parses([*server["command"], "--no-such-option"])


def test_the_commands_of_the_readme_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    commands = [
        line.split(" -- ")[1]
        for line in text.splitlines()
        if line.startswith("runuser ") and "/silotune " in line
    ]
    assert [parses(shlex.split(command)) for command in commands] == ["silotune server init"]


def test_stopping_leaves_time_to_drain() -> None:
    found = settings()
    assert found["KillMode"] == ["mixed"]  # the SuperLink's end is for `server start` to order
    (seconds,) = found["TimeoutStopSec"]
    assert int(seconds) >= 2 * (service.DRAIN_SECONDS + 5)
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert server["stop_grace_period"] == "1m"


def test_the_unit_can_write_its_own_folder_alone() -> None:
    found = settings()
    (folder,) = found["ReadWritePaths"]
    assert f"--folder {folder} " in found["ExecStart"][0]
    assert found["ProtectSystem"] == ["strict"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["User"] == ["silotune-server"]
    assert found["UMask"] == ["0077"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_reads_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/silotune/bin/", "/bin/true "))
    for words in (["verify"], ["security", "--offline=yes", "--no-pager", "--threshold=25"]):
        done = subprocess.run(
            ["systemd-analyze", *words, copy], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_compose_publishes_nginx_and_nothing_else() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert list(services) == ["server"]
    server = services["server"]
    assert server["ports"] == ["8443:8443"]  # not the SuperLink, not the metrics
    assert "network_mode" not in server
    assert "expose" not in server
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & set(server)
    assert server["user"].split(":")[0] != "0"
    assert not any("docker.sock" in volume for volume in server["volumes"])


def test_the_log_is_rotated_without_root_in_the_servers_folder() -> None:
    text = (DEPLOY / "logrotate").read_text()
    assert "su silotune-server silotune-server" in text
    assert "copytruncate" in text
    assert "postrotate" not in text
    assert "nginx/access.log" in text
