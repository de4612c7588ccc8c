"""lpcompile in a training loop of one's own: compile, attach, train, read the certificate.

python examples/own_loop.py [POLICY]
"""

import sys

import torch
from torch import nn

from lpcompile import attach, lpcompile, report


def main(policy: str = "fp8-rowwise") -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randn(256, 10)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    lpcompile(model, policy, example_inputs=(x,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach(model, optimizer)  # schedule and random streams follow optimizer.step()
    for step in range(51):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    print(report(model).to_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
