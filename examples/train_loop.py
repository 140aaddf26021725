"""Any model, any data, split over the ranks that torchrun starts. Plan once, then train:

shardwise plan --model examples/train_loop.py:model_and_batch --cluster local:2 --out plan.json
torchrun --nproc-per-node 2 examples/train_loop.py plan.json
"""

import sys

import torch
import torch.distributed as dist

import shardwise as sw


class Classifier(torch.nn.Module):
    """An ordinary model: it knows nothing of ranks, and its output is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 10))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layers(x), y)


def batch(step: int) -> dict[str, torch.Tensor]:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x[:, :10].argmax(dim=1)}


def model_and_batch() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Classifier(), batch(0)


def main() -> None:
    dist.init_process_group("gloo")
    model, example = model_and_batch()
    job = sw.parallelize(
        model, example, plan=sw.Plan.load(sys.argv[1]), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    )
    for step in range(50):
        loss = job.step(batch(step))
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
