"""What a simulation found: its figures, report and adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, field_validator

from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import ErrorCode, UsageError
from silotune.common.formats import strict_json
from silotune.simulations.execution.variants import PLAIN

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

    from silotune.common.tasks.calibration import Calibration

FORMAT = 1  # of result.json
SHOWN = 3  # metrics in a notebook; `table` has all


class _Spread(BaseModel):
    mean: float
    sd: float
    values: list[float]


class _Stopped(BaseModel):
    word: str
    why: str


class _Variant(BaseModel):
    name: Annotated[str, StringConstraints(pattern=r"^[\w-]+$")]  # names a folder, too
    label: str
    main: bool
    private: bool
    repeats: int
    epsilon: float | None
    delta: float | None
    stopped: _Stopped | None
    metrics: dict[str, _Spread | None]


class _Privacy(BaseModel):
    unit: str
    adjacency: str
    accountant: str
    insecure: bool


class _Metric(BaseModel):
    name: str


class _Verdict(BaseModel):
    word: str
    headline: str
    warnings: list[str]


class _Content(BaseModel):
    """What is read of result.json here; what else it has is for its report."""

    format: int
    contract_json: str
    quick: bool = False
    privacy: _Privacy
    metric: _Metric
    verdict: _Verdict
    variants: list[_Variant] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _one_is_judged(cls, variants: list[_Variant]) -> list[_Variant]:
        if not any(variant.main for variant in variants):
            raise ValueError("no variant is the main one")
        return variants


@dataclass(frozen=True)
class RunResult:
    """A finished comparison of methods.

    Attributes:
        folder: Where the run's files are.
        contract: What was run: the contract with the simulation's ε, δ and keys of masks.
        content: The content of result.json; the report is made of nothing else.
    """

    folder: Path
    contract: Contract = field(repr=False)
    content: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> RunResult:
        """Read the result of a run that has ended, also one of `silotune sim run`.

        Args:
            folder: The run's folder.

        Returns:
            Its result.

        Raises:
            UsageError: If the folder has no result, a damaged one, or one of another format.
        """
        folder = Path(folder)
        try:
            content = strict_json.loads((folder / "result.json").read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
                raise UsageError(
                    f"{folder / 'result.json'} has format {content['format']!r}, and this Silotune "
                    f"reads format {FORMAT}: use the Silotune that wrote it.",
                    code=ErrorCode.RUN_FOLDER_UNUSABLE,
                )
            _Content.model_validate(content)
        except (OSError, ValueError):
            raise UsageError(
                f"{folder} has no readable result.json: name the folder of a run that has ended."
            ) from None
        return cls.of(folder, content)

    @classmethod
    def of(cls, folder: Path, content: Mapping[str, Any]) -> RunResult:
        """The result in a folder, from the content of its result.json."""
        contract = contracts.parse(content["contract_json"], str(folder / "contract.json"))
        return cls(folder, contract, content)

    def __repr__(self) -> str:
        quick = ", quick=True" if self.content.get("quick") else ""
        return f"RunResult(folder={self.folder!r}{quick})"

    @property
    def metrics(self) -> dict[str, float | None]:
        """The main method (the contract's own, if it was run) on the public test rows: each
        metric's mean over its runs; None where the rows do not define it, or it diverged."""
        return {name: found and found["mean"] for name, found in self._main["metrics"].items()}

    @property
    def calibration(self) -> Calibration | None:
        """What the outputs of `adapter` are calibrated by: public rows that no metric uses. None
        where there were too few, or the task has none."""
        from silotune.common.tasks.calibration import Calibration

        found = (self.content.get("calibration") or {}).get("fitted")
        return Calibration.model_validate(found) if found else None

    @property
    def adapter(self) -> Path:
        """The file of the adapter that the first run of the main method released.

        Raises:
            UsageError: If the main method came to no adapter; it says why.
        """
        if stopped := self._main["stopped"]:
            raise UsageError(f"{self._main['label']} released no adapter. {stopped['why']}")
        if self._main["name"] == PLAIN:
            raise UsageError(f"{self._main['label']} has no adapter: run another variant, too.")
        return self.folder / "variants" / f"{self._main['name']}-0" / "adapter.safetensors"

    @property
    def _main(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(v for v in self.content["variants"] if v["main"])
        return found

    def table(self) -> pd.DataFrame:
        """The methods and their figures.

        Returns:
            A row for each method, by its name. Columns: `label`; for each metric its mean over the
            runs, and under the metric's name with `_sd` their standard deviation (missing for one
            run); `runs`; `epsilon` and `delta`, which hold for each site and one run. Epsilon is
            infinite without a guarantee, and missing where no record has a part in a method.
            `stopped` is empty, or "diverged" or "failed" of a method that has no figures. The
            unit and the accountant are in `attrs`, and whether it was a run of `--quick`.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for variant in self.content["variants"]:
            row = {"method": variant["name"], "label": variant["label"]}
            for name, found in variant["metrics"].items():
                row[name] = found["mean"] if found else math.nan
                several = found is not None and len(found["values"]) > 1
                row[f"{name}_sd"] = found["sd"] if several else math.nan
            row |= {"runs": variant["repeats"], "epsilon": self._epsilon(variant)}
            row["delta"] = math.nan if not math.isfinite(row["epsilon"]) else variant["delta"]
            row["stopped"] = variant["stopped"]["word"] if variant["stopped"] else ""
            rows.append(row)
        table = pd.DataFrame(rows).set_index("method")
        privacy = self.content["privacy"]
        table.attrs = {key: privacy[key] for key in ("unit", "adjacency", "accountant")}
        table.attrs["quick"] = bool(self.content.get("quick"))
        return table

    def _epsilon(self, variant: Mapping[str, Any]) -> float:
        """Seeded noise is no guarantee."""
        if not variant["private"] or (variant["epsilon"] and self.content["privacy"]["insecure"]):
            return math.inf
        return float(variant["epsilon"]) if variant["epsilon"] else math.nan

    def report(self, path: str | Path) -> Path:
        """Write the report: one HTML file that loads nothing from elsewhere.

        Args:
            path: The file; one that is there is replaced.

        Returns:
            The file's path.

        Raises:
            UsageError: If the file cannot be written.
        """
        from silotune.server.report.report import write_report

        path = Path(path)
        try:
            write_report(self.content, path)
        except OSError as error:
            raise UsageError(
                f"The report {path} cannot be written: {error.strerror}. Name a file in a folder "
                "that is there."
            ) from None
        return path

    def _repr_html_(self) -> str:
        from silotune.server.report.report import guarantee

        figure = self.content["metric"]["name"]
        others = [name for name in self.contract.task.metrics if name != figure]
        names = [figure, *others][:SHOWN]
        head = "".join(f"<th>{escape(t)}</th>" for t in ("method", *names, "guarantee"))
        body = "".join(
            "<tr>"
            + "".join(
                f"<td>{escape(text)}</td>"
                for text in (
                    variant["label"],
                    *(_figure(variant, variant["metrics"].get(name)) for name in names),
                    guarantee(self.content, variant["epsilon"], variant["delta"])
                    if variant["private"]
                    else "none",
                )
            )
            + "</tr>"
            for variant in self.content["variants"]
        )
        verdict = self.content["verdict"]
        lines = [f"{self.contract.name}: {verdict['headline']}", *verdict["warnings"]]
        return (
            "".join(f"<p>{escape(line)}</p>" for line in lines)
            + f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def _figure(variant: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    if variant["stopped"]:
        return str(variant["stopped"]["word"])
    if not found:
        return "–"
    spread = f" ±{found['sd']:.3f}" if len(found["values"]) > 1 else ""
    return f"{found['mean']:.3f}{spread}"
