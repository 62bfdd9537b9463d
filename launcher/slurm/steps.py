"""Job steps of Slurm: one that runs a fold's ranks over several nodes, and one that only hears of preemption."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from doccls.system.lifeline import LAUNCHED
from doccls.system.signals import agree_to_stop
from launcher.local import KILL_LIMIT_S, LAUNCH, StartError
from launcher.plan import Assignment, drop_job_variables
from launcher.slurm.format import Allocation, parse_step_ends, render_step

_DUMP_S = 0.5
"""How long the processes get to write their stacks."""
_HEEDED = {
    code: number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) for code in (128 + number, -number)
}
"""Exit codes of the step -> the signal that ended it: a preemption's, or one ahead of a time limit (--signal)."""
_ENDS_S = 10.0
_SLEEPING_STEP = (
    "srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--gres=none", "--input=none", "--quiet",
    "sleep", "infinity",
)  # fmt: skip
"""A step that takes nothing from the job, and ends when Slurm sends SIGTERM to the job's steps."""


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
        ends = parse_step_ends(self.read_messages())
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

    def kill(self) -> None:
        """On SIGTERM srun has Slurm kill the whole step."""
        self._send(signal.SIGTERM)

    def wait(self, within_s: float = KILL_LIMIT_S) -> None:
        """Until all are gone, or so long."""
        with suppress(subprocess.TimeoutExpired):
            self._srun.wait(within_s)

    def read_messages(self) -> str:
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


class PreemptionWatch:
    """Asks this process to stop when Slurm sends a signal to its job's steps."""

    def __init__(self, srun: "subprocess.Popen[bytes]") -> None:
        self._srun, self._over = srun, False
        self._waiter = threading.Thread(target=self._wait, name="doccls-preemption", daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        number = _HEEDED.get(self._srun.wait())
        if number is not None and not self._over:
            agree_to_stop(number)  # no signal to this process: one that follows would be the second, and end it at once

    def join(self) -> None:
        """Wait until the step has ended."""
        self._waiter.join()

    def end(self) -> None:
        """End the step; what it says from now on is no news."""
        self._over = True
        self._srun.terminate()
        try:
            self._srun.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            self._srun.kill()


@contextmanager
def watching_for_preemption() -> Iterator[PreemptionWatch | None]:
    """Within the block, in a job of Slurm; None where there is no srun (in a container, say).

    A step that can't be had is no error: the task hears of the preemption at the end of its grace time.
    """
    environment = drop_job_variables(os.environ) | {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"]}
    try:
        srun = subprocess.Popen(
            _SLEEPING_STEP, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the job's batch script is not its to hear
        )  # fmt: skip
    except OSError:  # there is none, or it can't be run here
        yield None
        return
    watch = PreemptionWatch(srun)
    try:
        yield watch
    finally:
        watch.end()
