"""Speed of doccls compared with timm's train.py and a bare PyTorch loop: `python -m benchmarks --help`."""
