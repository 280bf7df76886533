"""SOAP of `pytorch-optimizer`, for gradients that come from elsewhere.

The environment holds torch, pytorch-optimizer and numpy. The input holds `param_0` and
so on. For each line of JSON that it reads, `{}`, it reads the gradients from the file
`exchange` beside the input, takes a step, writes the parameters there, and answers
with the `state_size`. Kernels of convolutions are matrices from patches to channels.
Settings as in `torch_optimizers`.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from protocol import answer, rate_at
from torch_optimizers import OPTIMIZERS, numbers


def main() -> None:
    """Answers each line of the input with a step."""
    parser = argparse.ArgumentParser(description="A peer; see benchmarks/peers.")
    parser.add_argument("--input", type=Path, required=True, help="the arrays (npz)")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with np.load(options.input) as file:
        params = [torch.from_numpy(file[f"param_{i}"]) for i in range(len(file.files))]
    seen = [p.reshape(-1, p.shape[-1]) if p.ndim > 2 else p for p in params]
    size = sum(p.numel() for p in params)
    exchange = np.memmap(
        options.input.parent / "exchange", np.float32, "w+", shape=size
    )
    settings = dict(options.settings)
    total = settings.pop("total_steps", None)
    optimizer = OPTIMIZERS[settings.pop("optimizer")](
        [torch.nn.Parameter(p) for p in seen],
        lr=settings.pop("learning_rate"),
        **settings,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(step, total)
    )
    held = optimizer.param_groups[0]["params"]
    ends = np.cumsum([0, *(p.numel() for p in held)])
    answer({"versions": {n: version(n) for n in ("torch", "pytorch-optimizer")}})
    for _ in sys.stdin:
        flat = torch.from_numpy(np.array(exchange))
        for p, start, end in zip(held, ends, ends[1:], strict=False):
            p.grad = flat[start:end].reshape(p.shape)
        optimizer.step()
        schedule.step()
        exchange[:] = torch.cat([p.detach().reshape(-1) for p in held]).numpy()
        answer({"state_size": numbers(optimizer.state) / size})


if __name__ == "__main__":
    main()
