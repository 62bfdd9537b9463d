"""How fast it is, against timm's train.py and a bare PyTorch loop: `python -m benchmarks --help`."""
