"""A site joins: what is written into site.toml, and when nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from silotune.client.site import policy as policies
from silotune.common.cli.main import silotune
from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError, UsageError
from silotune.server.operations import certificate_authority

Join = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, table_contract: Contract, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site in `north`, a contract, two CAs."""
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(silotune, ["site", "init", "--name", "north", "--folder", "north"])
    assert made.exit_code == 0, made.output
    (tmp_path / "contract.json").write_text(table_contract.model_dump_json())
    for name in ("ca", "other"):
        (tmp_path / f"{name}.crt").write_bytes(certificate_authority.make_ca(name)[0].certificate)
    return tmp_path


@pytest.fixture
def join(folder: Path) -> Join:
    def call(*more: str, ca: str = "ca.crt", reads_out: str = "ca.crt") -> Result:
        print_ = certificate_authority.fingerprint((folder / reads_out).read_bytes())
        return CliRunner().invoke(
            silotune,
            [
                "site",
                "join",
                "contract.json",
                "--config",
                "north/site.toml",
                "--server",
                "fl.example.org:8443",
                "--ca",
                ca,
                "--fingerprint",
                print_,
                *more,
            ],
        )

    return call


def test_what_is_agreed_is_written_and_signed(
    folder: Path, join: Join, table_contract: Contract
) -> None:
    before = (folder / "north" / "site.toml").read_text()
    done = join(
        "--set",
        "data.duplicate_records=keep",
        "--set",
        "permits.min_records=20",
        "--set",
        'data.key=["age"]',
    )
    assert done.exit_code == 0, done.output
    assert f"leaves the site: {table_contract.leaves}" in done.output
    assert "policy number 1 of north" in done.output
    policy = policies.load(folder / "north" / "site.toml")
    assert policy.permits.contracts == (table_contract.hash,)
    assert (policy.data.duplicate_records, policy.data.key, policy.permits.min_records) == (
        "keep",
        ("age",),
        20,
    )
    assert policy.server is not None
    assert policy.server.address == "fl.example.org:8443"
    assert policy.server.ca.read_bytes() == (folder / "ca.crt").read_bytes()
    after = (folder / "north" / "site.toml").read_text()
    comments = [
        line
        for line in before.splitlines()
        if line.startswith("#")
        and "server" not in line
        and "address" not in line
        and "ca =" not in line
    ]
    assert all(line in after for line in comments)


def test_a_second_contract_comes_beside_the_first(
    folder: Path, join: Join, table_contract: Contract
) -> None:
    assert join().exit_code == 0
    second = table_contract.changed(name="second")
    (folder / "contract.json").write_text(second.model_dump_json())
    assert join().exit_code == 0
    assert join().exit_code == 0  # once more changes nothing
    policy = policies.load(folder / "north" / "site.toml")
    assert policy.permits.contracts == (table_contract.hash, second.hash)


def test_another_ca_than_the_one_read_out(folder: Path, join: Join) -> None:
    before = (folder / "north" / "site.toml").read_bytes()
    done = join(ca="other.crt")
    assert isinstance(done.exception, UsageError)
    assert "do not continue; phone the operator" in str(done.exception)
    assert (folder / "north" / "site.toml").read_bytes() == before
    assert not (folder / "north" / "server-ca.crt").exists()


def test_a_slip_of_the_pen_is_no_other_ca(folder: Path, join: Join) -> None:
    done = join("--fingerprint", "AA")
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == (
        "'AA' is no fingerprint: this one has 32 pairs of hexadecimal digits."
    )
    assert not (folder / "north" / "server-ca.crt").exists()


def test_a_second_certificate_behind_the_compared_one_is_not_trusted(
    folder: Path, join: Join
) -> None:
    """Whoever carried the file could be a server, to a site that took all that is in it."""
    genuine = (folder / "ca.crt").read_bytes()
    (folder / "both.crt").write_bytes(genuine + (folder / "other.crt").read_bytes())
    assert join(ca="both.crt").exit_code == 0
    assert (folder / "north" / "server-ca.crt").read_bytes() == genuine


def test_a_link_to_the_policy_stays_one(folder: Path, join: Join) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "north" / "site.toml").rename(folder / "north" / "real.toml")
    (folder / "north" / "site.toml").symlink_to("real.toml")
    join()
    assert (folder / "north" / "site.toml").is_symlink()
    assert "server-ca.crt" in (folder / "north" / "real.toml").read_text()


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("data.duplicate_records=sometimes", ContractError),
        ("data.nonsense=1", ContractError),
        ("permits.min_records=-1", ContractError),
        ("permits.contracts=[]", None),
        ("data.duplicate_records", UsageError),
        ("name.x=1", UsageError),
        ("permits=1", UsageError),
    ],
)
def test_a_setting_that_makes_no_policy_writes_nothing(
    folder: Path, join: Join, setting: str, kind: type[Exception] | None
) -> None:
    before = (folder / "north" / "site.toml").read_bytes()
    done = join("--set", setting)
    if kind is None:
        assert done.exit_code == 0
        return
    assert isinstance(done.exception, kind), done.exception
    assert (folder / "north" / "site.toml").read_bytes() == before


def test_the_fingerprint_is_the_requests(folder: Path) -> None:
    run = CliRunner()
    said = run.invoke(silotune, ["site", "fingerprint", "--config", "north/site.toml"])
    from silotune.common.protocol import join_request

    file = folder / "north" / "north.request.json"
    assert said.output.strip() == join_request.load(file).fingerprint
    # What was put into the file by somebody else is not read out.
    changed = json.loads(file.read_text()) | {"public_key": "0" * 64}
    file.write_text(json.dumps(changed))
    refused = run.invoke(silotune, ["site", "fingerprint", "--config", "north/site.toml"])
    assert isinstance(refused.exception, UsageError)
    assert "Do not send it" in str(refused.exception)
    file.unlink()
    again = run.invoke(silotune, ["site", "fingerprint", "--config", "north/site.toml"])
    assert again.output == said.output
