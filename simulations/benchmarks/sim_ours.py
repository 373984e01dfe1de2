"""Ours in sim.py: the product's own engine, as `silotune sim` and studies run it.

Its clock starts before run_job, so the first round also has what comes before all rounds: reading
the model, opening twenty sites and running the frozen layers over their texts. The last round has
the scores of the public texts, and every round the durable writes of the server's registry.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from silotune.simulations.benchmarks import command_line, sim_workload
from silotune.simulations.execution.variants import Job

OURS = "ours"
QUEUES, FLOAT32, PRIVATE = "ours-queues", "ours-float32", "ours-dp"


def main(side: str, case: str, folder: Path, rounds: int, out: Path) -> None:
    """side: OURS; through Flower's queues; in float32 where it would take bfloat16; with noise."""
    sim_workload.libraries()
    from silotune.common.contract.compute import Performance
    from silotune.common.models.encoder import Encoder
    from silotune.simulations.execution.job import run_job

    facts, encoded, encode = sim_workload.facts_of(folder), list[int](), Encoder.encode

    def noted(model: Encoder, inputs: object) -> object:
        found = encode(model, inputs)  # type: ignore[arg-type]
        encoded.extend(t.nbytes for t in vars(found).values() if t is not None)
        return found

    contract = sim_workload.contract(facts["sha256"], case, rounds, private=side == PRIVATE)
    with TemporaryDirectory() as place, mock.patch.object(Encoder, "encode", noted):
        job = Job(
            side,
            0,
            contract,
            Path(place) / "run",
            Path(facts["model"]),
            folder,
            federated=side == QUEUES,
            evaluate_every=rounds,
            performance=Performance(bf16="off" if side == FLOAT32 else "auto"),
        )
        memory, clock = sim_workload.Memory(), sim_workload.Clock(out)
        run_job(job, lambda *_: clock.done())
        found = memory.found()
        stored = next(job.folder.rglob(f"rounds/{sim_workload.AGREE:04d}"))
        sim_workload.keep(out, sim_workload.read(stored / "adapter.safetensors"))
    model = (Path(facts["model"]) / "model.safetensors").stat().st_size
    sim_workload.report(clock, found, model=model, data=sum(encoded))


if __name__ == "__main__":
    main(*command_line.side(__doc__))
