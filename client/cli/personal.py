"""`silotune site own`: a site's own model, of the released adapter and what stayed at the site."""

from __future__ import annotations

from pathlib import Path

import click

from silotune.client.cli.options import CONFIG
from silotune.common.cli.main import emit
from silotune.common.cli.options import JSON
from silotune.common.contract import contract as contracts
from silotune.common.errors import UsageError
from silotune.common.protocol.tensors import load
from silotune.common.runtime.terminal import echo


@click.command()
@click.argument(
    "released",
    type=click.Path(path_type=Path),
    help="The operator's folder of the run: contract.json and adapter.safetensors.",
)
@click.option("--run", "name", help="Which run, if the ledger has several of this contract.")
@CONFIG
@click.option(
    "--out",
    default=Path("own"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder to write to, which must not exist.",
)
@JSON
def own(released: Path, name: str | None, config: Path, out: Path, as_json: bool) -> None:
    """Make this site's own model from the adapter of a run.

    What the run left at this site (`personal` in the contract, or method fedsa) is put into the
    adapter that it released. What it writes is used like any run's folder (silotune adapter).

    It is as private as what left the site: trained with the same noise, which is charged to ε.
    Under a contract without DP it has no noise.

    \b
    $ silotune site own released --out own
    ✓ own  hospital-a's own model of heart-diagnosis-20261122-1015: 2 of 10 tensors
    """
    from safetensors.numpy import save

    from silotune.client.privacy.reply_store import ReplyStore
    from silotune.client.site.folder import SiteFolder
    from silotune.client.training.local_state import LocalState
    from silotune.common.runtime.atomic_files import write_durably

    contract = contracts.load(released / "contract.json")
    policy, ledger, _ = SiteFolder.at(config).open()
    charges = [c for c in ledger.charges.values() if c.contract == contract.hash]
    left = {
        c.run: None
        for c in charges
        if (entry := ledger.releases.get(c.sequence)) is not None and entry.local_state
    }
    if name is None and len(left) == 1:
        (name,) = left
    if name not in left:
        known = ", ".join(left) or "none: the contract leaves nothing, or the site had no part"
        raise UsageError(f"Name the run with --run; runs that left something here: {known}.")
    found = LocalState.read(ReplyStore(ledger).local_state(c for c in charges if c.run == name))
    arrays = load(released / "adapter.safetensors")
    own_names = sorted(set(found.tensors) & set(arrays))
    if out.exists():
        raise UsageError(f"{out} exists. Name a new folder with --out.")
    out.mkdir(mode=0o700, parents=True)
    write_durably(out / "contract.json", (released / "contract.json").read_bytes())
    write_durably(out / "adapter.safetensors", save(found.model(arrays)))
    facts = {"run": name, "site": policy.name, "own": own_names, "tensors": len(arrays)}
    if contract.privacy.mode == "none":
        echo("! The contract trains without DP: this model can give records away.", err=True)
    emit(
        facts,
        as_json,
        f"✓ {out}  {policy.name}'s own model of {name}: {len(own_names)} of {len(arrays)} tensors",
    )
