"""The deploy files say what the command line takes, and keep the two users apart."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from silotune.client.cli.site import metrics
from silotune.client.cli.worker import worker
from silotune.client.operations.telemetry import FILE

DEPLOY = Path(__file__).parents[3] / "client" / "deploy"
UNITS = (
    "silotune-worker.socket",
    "silotune-worker.service",
    "silotune-relay.service",
    "silotune-metrics.service",
)
LARGEST_EXPOSURE = {"worker": 45, "relay": 45, "metrics": 25}  # of 100, by systemd-analyze


def settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / unit).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def test_the_two_users_are_two() -> None:
    worker_unit, relay = (settings(unit) for unit in UNITS[1:3])
    socket = settings(UNITS[0])
    assert worker_unit["User"] != relay["User"]
    assert socket["SocketUser"] == relay["User"]
    assert socket["SocketMode"] == ["0600"]
    assert worker_unit["PrivateNetwork"] == ["yes"]
    assert relay["InaccessiblePaths"] == ["/var/lib/silotune"]
    assert worker_unit["UMask"] == relay["UMask"] == ["0077"]


def test_the_worker_unit_uses_options_that_exist() -> None:
    (command,) = settings(UNITS[1])["ExecStart"]
    options = {option for parameter in worker.params for option in parameter.opts}
    assert {word for word in command.split() if word.startswith("--")} <= options


def test_the_metrics_unit_parses_and_sees_one_folder() -> None:
    found = settings(UNITS[3])
    (command,) = found["ExecStart"]
    parsed = metrics.make_context("metrics", command.split()[3:]).params
    folder = parsed["config"].parent
    assert found["TemporaryFileSystem"] == [f"{folder}:ro"]
    assert found["BindReadOnlyPaths"] == [f"-{folder / 'state' / Path(FILE).parent}"]
    assert "ReadWritePaths" not in found
    assert found["IPAddressDeny"] == ["any"]
    assert found["IPAddressAllow"] == ["localhost"]
    assert found["User"] == settings(UNITS[1])["User"]


def test_no_unit_lets_a_flower_app_install_packages() -> None:
    for file in DEPLOY.iterdir():
        assert "--allow-runtime-dependency-installation" not in file.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = (DEPLOY / unit).read_text()
        (tmp_path / unit).write_text(text.replace("/opt/silotune/bin/", "/bin/true "))
    done = subprocess.run(
        ["systemd-analyze", "verify", *(tmp_path / unit for unit in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("name", LARGEST_EXPOSURE)
def test_little_is_exposed(name: str) -> None:
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=yes",
            "--no-pager",
            f"--threshold={LARGEST_EXPOSURE[name]}",
            DEPLOY / f"silotune-{name}.service",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_compose_keeps_records_and_network_apart() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services["worker"]["network_mode"] == "none"
    assert not any("./site" in volume for volume in services["relay"]["volumes"])
    assert "socket:/run/silotune:ro" in services["relay"]["volumes"]
    assert all(s["cap_drop"] == ["ALL"] for s in services.values())
