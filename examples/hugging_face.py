"""A model and a tokenizer of the transformers library on a text of yours, from local files alone: nothing is downloaded.

shardwise plan --model examples/hugging_face.py:model_and_batch --cluster local:2 --out plan.json
torchrun --nproc-per-node 2 examples/hugging_face.py plan.json

or, with the loop of shardwise:

shardwise train --model examples/hugging_face.py:model_and_batch --data examples/hugging_face.py:datasets_of_text
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import default_collate

import shardwise as sw
from shardwise.data import Loader

TEXT = Path(os.environ.get("TEXT", Path(os.__file__).parent / "argparse.py"))  # any text file
BATCH, SEQUENCE, VOCABULARY = 8, 64, 512


def tokenizer() -> Any:
    """Byte pairs learnt from the text itself; `AutoTokenizer.from_pretrained(folder)` reads one that you have."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(TEXT.read_text().splitlines(), vocab_size=VOCABULARY, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer)


class Tensors:
    """Rows as tensors: a list, or a dataset of the library `datasets`, which has the same rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(values) for name, values in self.rows[index].items()}


def datasets_of_text() -> tuple[Any, Any]:
    """Samples of input_ids and labels, to train on and to evaluate on."""
    tokens = tokenizer()(TEXT.read_text())["input_ids"]
    cut = [tokens[start : start + SEQUENCE] for start in range(0, len(tokens) - SEQUENCE + 1, SEQUENCE)]
    kept = len(cut) // 10
    rows = [{"input_ids": each, "labels": each} for each in cut]
    return Tensors(rows[kept:]), Tensors(rows[:kept])


def model_and_batch() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """`AutoModelForCausalLM.from_pretrained(folder)` reads a model that you have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
    )
    tokens = torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % VOCABULARY
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def main() -> None:
    dist.init_process_group("gloo")
    model, example = model_and_batch()
    job = sw.parallelize(
        model, example, plan=sw.Plan.load(sys.argv[1]), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    )
    training, held_out = datasets_of_text()
    batches = Loader(training, BATCH, part=job.batch_slice).forever()
    for step in range(60):
        loss = job.step(next(batches), local=True)
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}")
    few = default_collate([held_out[index] for index in range(BATCH)])
    after = job.eval(few)
    logits = job.predict({"input_ids": few["input_ids"]}).logits
    if dist.get_rank() == 0:
        print(f"held out {after:.4f}, logits {list(logits.shape)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
