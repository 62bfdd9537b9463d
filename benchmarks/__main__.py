"""`python -m benchmarks --timm CHECKOUT | --gpu`: interleaved runs against timm and bare loops, as ratios."""

import argparse
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import timm
import torch

from benchmarks.cases import CASES, Bench, Case, Figures
from benchmarks.gpu import PAGES, measure_gpu
from benchmarks.measure import adopt_orphans
from benchmarks.pages import draw_pages

_FEW = 64


def main() -> None:
    """Measure the cases that were asked for, and print each one's table when it is done."""
    words = _build_parser().parse_args()
    if words.gpu:
        if not torch.cuda.is_available():
            print("GPU: not measured (none here)")
            return
        with tempfile.TemporaryDirectory(prefix="doccls-bench-") as made:
            folder = (words.folder or Path(made)).resolve()
            draw_pages(folder, PAGES)  # by forks, before this process has used the GPU
            print(describe_machine(), flush=True)
            measure_gpu(folder, words.minutes)
        return
    adopt_orphans()
    version = (words.timm / "timm" / "version.py").read_text().partition("=")[2].strip(" '\n")
    print(f"{describe_machine()} (train.py of {version})", flush=True)
    with tempfile.TemporaryDirectory(prefix="doccls-bench-") as made:
        folder = (words.folder or Path(made)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        pages, few = folder / f"a4-{words.pages}", folder / "a4-few"
        draw_pages(pages, words.pages)
        draw_pages(few, _FEW)
        bench = Bench(folder, pages, few, words.timm.resolve(), words.epochs)
        for case in CASES:
            if case.name in words.only:
                rounds = min(words.rounds, case.rounds)
                measured: dict[str, list[Figures]] = {name: [] for name in case.contenders}
                for number in range(rounds):  # in turn, so that what disturbs the machine disturbs all of them
                    for name, act in case.contenders.items():
                        measured[name].append(act(bench, number))
                print("\n".join(render_case(case, measured)), flush=True)
    if not torch.cuda.is_available():
        print("\nGPU: not measured (none here)")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [case.name for case in CASES]
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--timm", type=Path, metavar="CHECKOUT", help="of timm's repository")
    which.add_argument("--gpu", action="store_true", help="steps and loader on this machine's GPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="with --gpu: begin nothing that takes longer")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3, help="at most (default: 3)")
    parser.add_argument("--pages", type=int, default=500, help="A4 pages to draw (default: 500)")
    parser.add_argument("--epochs", type=int, default=3, help="of the A4 cases (default: 3)")
    parser.add_argument("--folder", type=Path, help="to keep pages and runs in (default: a temporary one)")
    return parser


def describe_machine() -> str:
    """What was measured on: processor, memory, GPU and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    )


def render_case(case: Case, measured: Mapping[str, Sequence[Figures]]) -> list[str]:
    """A table: medians and spread of each contender, and the first one's over the others', round by round."""
    first = next(iter(measured))
    rounds = len(measured[first])
    lines = ["", f"{case.what} ({rounds} {'round' if rounds == 1 else 'rounds, interleaved'})"]
    lines += ["", f"| | {' | '.join(case.figures)} |", "|---" * (1 + len(case.figures)) + "|"]
    for name, runs in measured.items():
        cells = [_tell([one[figure] for one in runs if figure in one]) for figure in case.figures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, runs in measured.items():
        if name != first:
            ratios = [
                _tell([own[figure] / other[figure] for own, other in zip(measured[first], runs, strict=True)
                       if other.get(figure)])
                for figure in case.figures
            ]  # fmt: skip
            lines.append(f"| {first} / {name} | {' | '.join(ratios)} |")
    return lines


def _tell(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    digits = 2 if middle < 10 else 1 if middle < 100 else 0
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{middle:.{digits}f}{spread}"


if __name__ == "__main__":
    main()
