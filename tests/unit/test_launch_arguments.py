"""The arguments that a launch passes on to submitted tasks."""

from __future__ import annotations

import pytest

from launcher.arguments import list_task_args
from launcher.parser import build_parser


@pytest.mark.parametrize("start", ["server", "fresh"])
def test_submitted_task_starts_processes_as_the_command_says(start: str) -> None:
    parser, command = build_parser(), ["run", "--config", "c.yaml", "--backend", "slurm", "--start", start]
    submitted = list_task_args(parser.parse_args(command), "r", "doccls-launch run")
    assert parser.parse_args(["task", *submitted]).start == start
