"""Compare doccls with timm and bare loops in interleaved runs: `python -m benchmarks --timm CHECKOUT | --gpu`."""

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

_FEW_PAGES = 64


def main() -> None:
    """Measure the requested cases, and print the table of each when it is done."""
    arguments = _build_parser().parse_args()
    if arguments.gpu:
        if not torch.cuda.is_available():
            print("GPU: not measured (none here)")
            return
        with tempfile.TemporaryDirectory(prefix="doccls-bench-") as temporary:
            folder = (arguments.folder or Path(temporary)).resolve()
            draw_pages(folder, PAGES)  # forks, so before this process uses the GPU
            print(describe_machine(), flush=True)
            measure_gpu(folder, arguments.minutes)
        return
    adopt_orphans()
    version = (arguments.timm / "timm" / "version.py").read_text().partition("=")[2].strip(" '\n")
    print(f"{describe_machine()} (train.py of {version})", flush=True)
    with tempfile.TemporaryDirectory(prefix="doccls-bench-") as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        pages, few = folder / f"a4-{arguments.pages}", folder / "a4-few"
        draw_pages(pages, arguments.pages)
        draw_pages(few, _FEW_PAGES)
        bench = Bench(folder, pages, few, arguments.timm.resolve(), arguments.epochs)
        for case in CASES:
            if case.name in arguments.only:
                rounds = min(arguments.rounds, case.rounds)
                measured: dict[str, list[Figures]] = {name: [] for name in case.contenders}
                for number in range(rounds):  # interleaved, so that other load on the machine affects all contenders
                    for name, measure in case.contenders.items():
                        measured[name].append(measure(bench, number))
                print("\n".join(render_case(case, measured)), flush=True)
    if not torch.cuda.is_available():
        print("\nGPU: not measured (none here)")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [case.name for case in CASES]
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--timm", type=Path, metavar="CHECKOUT", help="checkout of timm's repository")
    which.add_argument("--gpu", action="store_true", help="measure steps and loader on this machine's GPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="time limit with --gpu (default: 5)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3, help="maximum number of rounds (default: 3)")
    parser.add_argument("--pages", type=int, default=500, help="A4 pages to draw (default: 500)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the A4 cases (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to keep pages and runs (default: a temporary folder)")
    return parser


def describe_machine() -> str:
    """Describe the machine: processor, memory, GPU and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    )


def render_case(case: Case, measured: Mapping[str, Sequence[Figures]]) -> list[str]:
    """Render a table: median and range of each contender, and the first one's ratio to each other one by round."""
    first = next(iter(measured))
    rounds = len(measured[first])
    lines = ["", f"{case.what} ({rounds} {'round' if rounds == 1 else 'rounds, interleaved'})"]
    lines += ["", f"| | {' | '.join(case.figures)} |", "|---" * (1 + len(case.figures)) + "|"]
    for name, runs in measured.items():
        cells = [_format_values([run[figure] for run in runs if figure in run]) for figure in case.figures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, runs in measured.items():
        if name != first:
            ratios = [
                _format_values([own[figure] / other[figure] for own, other in zip(measured[first], runs, strict=True)
                       if other.get(figure)])
                for figure in case.figures
            ]  # fmt: skip
            lines.append(f"| {first} / {name} | {' | '.join(ratios)} |")
    return lines


def _format_values(values: Sequence[float]) -> str:
    if not values:
        return ""
    median = statistics.median(values)
    digits = 2 if median < 10 else 1 if median < 100 else 0
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{median:.{digits}f}{spread}"


if __name__ == "__main__":
    main()
