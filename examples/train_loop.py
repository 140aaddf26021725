"""Any model, any data, split over the ranks that torchrun starts. Plan once, then train:

shardwise plan --model examples/train_loop.py:model_and_batch --cluster local:2 --out plan.json
torchrun --nproc-per-node 2 examples/train_loop.py plan.json
"""

import sys

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate

import shardwise as sw
from shardwise.data import Loader

BATCH = 32


class Classifier(torch.nn.Module):
    """An ordinary model: it knows nothing of ranks. Its output has a loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(512, 10))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        scores = self.layers(x)
        return {"scores": scores} if y is None else {"loss": torch.nn.functional.cross_entropy(scores, y), "scores": scores}


class Samples(Dataset[dict[str, torch.Tensor]]):
    """An ordinary dataset: sample i, without the batch dim."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(64, generator=torch.Generator().manual_seed(self.first + index))
        return {"x": x, "y": x[:10].argmax()}


def model_and_batch() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Classifier(), default_collate([Samples(0, BATCH)[index] for index in range(BATCH)])


def main() -> None:
    dist.init_process_group("gloo")
    model, example = model_and_batch()
    job = sw.parallelize(
        model, example, plan=sw.Plan.load(sys.argv[1]), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    )
    training = Loader(Samples(0, 1600), BATCH, part=job.batch_slice)  # each rank reads its own samples of a batch
    held_out = Samples(10_000, 40)
    first = dist.get_rank() == 0
    for epoch in range(3):
        for batch in training:
            job.step(batch, local=True)
        losses = [job.eval(batch, local=True) for batch in Loader(held_out, BATCH, part=job.batch_slice, drop_last=False)]
        if first:
            print(f"epoch {epoch}: loss {job.loss:.4f}, held out {losses}")
    scores = job.predict({"x": torch.stack([held_out[index]["x"] for index in range(8)])})["scores"]
    state = job.state_dict()  # whole on rank 0, in the names of the model
    if first:
        print(f"right: {sum(int(scores[index].argmax() == held_out[index]['y']) for index in range(8))} of 8")
        alone = Classifier().eval()
        alone.load_state_dict(state["model"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
