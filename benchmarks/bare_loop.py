"""`python -m benchmarks.bare_loop`: the same model and step on pages that lie ready in memory, and nothing else.

What any trainer must do: normalize, forward, loss, backward, clip, step. Prints images/s of each epoch.
"""

import argparse
import time

import timm
import torch
from timm.optim import create_optimizer_v2

BATCH, THREADS = 32, 2


def main() -> None:
    """Train `--epochs` epochs of `--pages` random pages."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name in ("--size", "--pages", "--classes", "--epochs"):
        parser.add_argument(name, type=int, required=True)
    words = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    pages = torch.randint(0, 256, (words.pages, words.size, words.size, 3), dtype=torch.uint8)
    targets = torch.randint(0, words.classes, (words.pages,))
    model = timm.create_model(words.model, num_classes=words.classes).to(memory_format=torch.channels_last)
    mean = 255 * torch.tensor(model.default_cfg["mean"]).view(1, 3, 1, 1)
    factor = 1 / (255 * torch.tensor(model.default_cfg["std"]).view(1, 3, 1, 1))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.01)
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    for _ in range(words.epochs):
        started_s, seen = time.perf_counter(), 0
        for rows in torch.split(torch.randperm(words.pages), BATCH):
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
