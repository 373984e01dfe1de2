"""pfl-research's simulator in sim.py: FederatedAveraging on its SimulatedBackend.

One process in which the model is resident, torch with all cores, each client's texts tokenised
once: what its own benchmarks do. float32 is its default; BF16 is the same with its amp_dtype. Its
algorithm evaluates in the first round, and its model has to have metrics: here there are none.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from silotune.simulations.benchmarks import command_line, sim_workload

PFL, BF16 = "pfl", "pfl-bf16"


def module(base: Any) -> Any:
    """What PyTorchModel takes: a torch module with `loss` and `metrics`."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.head = base, torch.nn.Linear(384, len(sim_workload.LABELS))

        def loss(self, ids: Any, mask: Any, labels: Any) -> Any:
            outputs = sim_workload.logits(self.base, self.head, ids, mask)
            return torch.nn.functional.cross_entropy(outputs, labels)

        def metrics(self, **_: Any) -> dict[str, Any]:
            return {}

    return Classifier()


def main(side: str, case: str, folder: Path, rounds: int, out: Path) -> None:
    """side: PFL or BF16."""
    sim_workload.libraries()
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from transformers import AutoTokenizer

    asyncio.set_event_loop(asyncio.new_event_loop())  # its `run` asks for the thread's
    memory, clock, facts = (
        sim_workload.Memory(),
        sim_workload.Clock(out),
        sim_workload.facts_of(folder),
    )

    tokenizer = AutoTokenizer.from_pretrained(
        facts["model"], local_files_only=True, trust_remote_code=False
    )
    users = {
        who: PyTorchTensorDataset(
            sim_workload.batch(tokenizer, *sim_workload.rows_of(folder, who)), user_id=who
        )
        for who in sim_workload.WHO
    }
    base = sim_workload.encoder(facts["model"], case)
    net = module(base)
    found = sim_workload.tensors(base, net.head)
    with torch.no_grad():
        for name, array in sim_workload.read(folder / case).items():
            found[name].copy_(torch.from_numpy(array))

    class Marks(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            clock.done({name: p.detach().numpy() for name, p in found.items()})
            return False, Metrics()

    trained = [p for p in net.parameters() if p.requires_grad]
    model = PyTorchModel(
        net,
        torch.optim.SGD,
        torch.optim.SGD(trained, lr=1.0),
        amp_dtype=torch.bfloat16 if side == BF16 else None,
    )
    cohort = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(sim_workload.WHO))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=sim_workload.CLIENTS,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=cohort, val_data=cohort),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=sim_workload.RATE, local_batch_size=None
        ),
        callbacks=[Marks()],
        send_metrics_to_platform=False,
    )
    sim_workload.report(clock, memory.found())


if __name__ == "__main__":
    main(*command_line.side(__doc__))
