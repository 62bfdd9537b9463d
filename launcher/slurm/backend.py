"""The backend of a Slurm job of several nodes: the ranks of a fold are one job step on all of them."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from doccls.system.lifeline import LAUNCHED
from launcher.backend import KILL_LIMIT_S, LAUNCH, StartError
from launcher.plan import Assignment, drop_job_variables
from launcher.slurm.format import Allocation, parse_step_ends, render_step

_DUMP_S = 0.5
"""How long the processes get to write their stacks."""


class StepProcesses:
    """The ranks of one fold, as srun tells of them."""

    def __init__(self, srun: "subprocess.Popen[bytes]", ranks: int, said: Path) -> None:
        """`said` is the file into which srun writes."""
        self._srun, self._ranks, self._said = srun, ranks, said
        self.ended: list[int] = []

    @property
    def pids(self) -> tuple[int, ...]:
        """srun's."""
        return (self._srun.pid,)

    def poll(self) -> tuple[int | None, ...]:
        """Exit codes by rank: minus a signal's number where one killed, None while alive.

        srun tells at once of a rank that ended badly, of the others when all have ended.
        """
        code = self._srun.poll()
        ends = parse_step_ends(self.tell())
        rest = None if code is None else 0 if ends else code
        new = sorted((end >= 0, rank) for rank, end in ends.items() if rank not in self.ended)
        self.ended += [rank for _, rank in new]  # of those seen at once, who was killed is the cause
        return tuple(ends.get(rank, rest) for rank in range(self._ranks))

    def terminate(self) -> None:
        """Ask each rank to leave at its next safe point; srun passes this signal on, and not SIGTERM."""
        self._send(signal.SIGUSR1)

    def dump_stacks(self) -> None:
        """Have each rank write its Python stacks to its console."""
        self._send(signal.SIGUSR2)
        time.sleep(_DUMP_S)

    def strike(self) -> None:
        """On SIGTERM srun has Slurm kill the whole step."""
        self._send(signal.SIGTERM)

    def wait(self, within_s: float = KILL_LIMIT_S) -> None:
        """Until all are gone, or so long."""
        with suppress(subprocess.TimeoutExpired):
            self._srun.wait(within_s)

    def tell(self) -> str:
        """What srun and slurmstepd said."""
        return self._said.read_text(encoding="utf-8", errors="replace")

    def _send(self, number: int) -> None:
        if self._srun.poll() is None:
            self._srun.send_signal(number)


class SlurmBackend:
    """Starts folds as steps of the job that this process runs in, on its first node."""

    def __init__(self, allocation: Allocation, ranks_per_node: int, folder: Path) -> None:
        """`folder` is one of this machine's, for what is gone when the task has ended."""
        self._allocation, self._ranks_per_node, self._folder = allocation, ranks_per_node, folder

    def start(self, assignment: Assignment, consoles: Sequence[Path]) -> StepProcesses:
        """Start the ranks of a fold.

        Raises:
            StartError: srun or a file for what it says can't be had.
        """
        ranks, number = len(assignment.ranks), time.monotonic_ns()
        step = render_step(
            f"fold{assignment.fold}",
            assignment.ranks[0].argv,
            str(consoles[0]).removesuffix("0.txt"),
            self._allocation.nodes,
            self._ranks_per_node,
            self._allocation.cpus_per_node // self._ranks_per_node,
        )
        # Of the job, srun is told only which it is: what a shell in another job had left would bind or limit the step.
        environment = drop_job_variables(os.environ) | {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"], LAUNCHED: LAUNCH}
        environment |= assignment.ranks[0].environment  # each rank says its own number over it
        environment |= {"LOCAL_WORLD_SIZE": str(self._ranks_per_node)} | _choose_meeting_port()
        said = self._folder / f"fold{assignment.fold}.{number}.txt"
        try:
            consoles[0].parent.mkdir(parents=True, exist_ok=True)
            with said.open("wb") as out:
                srun = subprocess.Popen(
                    step,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,  # a signal to the job is this process's to hear, and to pass on
                )
        except OSError as error:
            raise StartError(f"fold {assignment.fold} can't be started: {error}") from error
        return StepProcesses(srun, ranks, said)


def _choose_meeting_port() -> dict[str, str]:
    """Where the ranks find each other: at a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(free.getsockname()[1])}
