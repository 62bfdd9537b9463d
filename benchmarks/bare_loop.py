"""Train the same model on random pages in memory by a minimal loop: `python -m benchmarks.bare_loop`.

Each step does what any trainer must: normalize, forward, loss, backward, clip, step. Prints images/s of each epoch.
"""

import argparse
import time

import timm
import torch
from timm.optim import create_optimizer_v2

BATCH, THREADS = 32, 2


def main() -> None:
    """Train for `--epochs` epochs on `--pages` random pages."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name in ("--size", "--pages", "--classes", "--epochs"):
        parser.add_argument(name, type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    pages = torch.randint(0, 256, (arguments.pages, arguments.size, arguments.size, 3), dtype=torch.uint8)
    targets = torch.randint(0, arguments.classes, (arguments.pages,))
    model = timm.create_model(arguments.model, num_classes=arguments.classes).to(memory_format=torch.channels_last)
    mean = 255 * torch.tensor(model.default_cfg["mean"]).view(1, 3, 1, 1)
    factor = 1 / (255 * torch.tensor(model.default_cfg["std"]).view(1, 3, 1, 1))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.01)
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    for _ in range(arguments.epochs):
        started_s, seen = time.perf_counter(), 0
        for rows in torch.split(torch.randperm(arguments.pages), BATCH):
            if len(rows) < BATCH:
                break
            images = pages[rows].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
            optimizer.zero_grad()
            criterion(model((images - mean) * factor), targets[rows]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            seen += BATCH
        print(f"images_per_s={seen / (time.perf_counter() - started_s):.2f}", flush=True)


if __name__ == "__main__":
    main()
