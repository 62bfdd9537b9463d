"""Slurm job steps: one that runs a fold's ranks on several nodes, and one that only detects preemption."""

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

_DUMP_S = 0.5  # time for the processes to write their stacks
# Exit code of the step -> the signal that ended it: a preemption's, or one ahead of a time limit (--signal).
_STOP_SIGNALS = {
    code: number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) for code in (128 + number, -number)
}
_EXIT_S = 10.0
# A step that uses none of the job's resources, and ends when Slurm sends SIGTERM to the job's steps.
_SLEEPING_STEP = (
    "srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--gres=none", "--input=none", "--quiet",
    "sleep", "infinity",
)  # fmt: skip


class StepProcesses:
    """The ranks of one fold, run by srun."""

    def __init__(self, srun: "subprocess.Popen[bytes]", ranks: int, output: Path) -> None:
        """Watch `srun`, which writes its output to the file `output`."""
        self._srun, self._ranks, self._output = srun, ranks, output
        self.ended: list[int] = []

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ID of srun."""
        return (self._srun.pid,)

    def poll(self) -> tuple[int | None, ...]:
        """Return the exit codes by rank: -N for a rank killed by signal N, None while the rank is alive.

        srun reports a failed rank at once, the others when all have ended.
        """
        srun_code = self._srun.poll()
        codes = parse_step_ends(self.read_messages())
        unreported = None if srun_code is None else 0 if codes else srun_code
        new = sorted((code >= 0, rank) for rank, code in codes.items() if rank not in self.ended)
        self.ended += [rank for _, rank in new]  # killed ranks first: they are the cause of the others' failure
        return tuple(codes.get(rank, unreported) for rank in range(self._ranks))

    def terminate(self) -> None:
        """Ask each rank to stop at its next safe point; srun forwards SIGUSR1, but not SIGTERM."""
        self._send(signal.SIGUSR1)

    def dump_stacks(self) -> None:
        """Make each rank write its Python stacks to its console."""
        self._send(signal.SIGUSR2)
        time.sleep(_DUMP_S)

    def kill(self) -> None:
        """Kill all ranks: on SIGTERM, srun has Slurm kill the step."""
        self._send(signal.SIGTERM)

    def wait(self, within_s: float = KILL_LIMIT_S) -> None:
        """Wait until all ranks have exited or the limit has passed."""
        with suppress(subprocess.TimeoutExpired):
            self._srun.wait(within_s)

    def read_messages(self) -> str:
        """Return the output of srun and slurmstepd."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def _send(self, number: int) -> None:
        if self._srun.poll() is None:
            self._srun.send_signal(number)


class SlurmBackend:
    """Backend that starts folds as steps of the job whose first node this process runs on."""

    def __init__(self, allocation: Allocation, ranks_per_node: int, folder: Path) -> None:
        """Start folds in `allocation`, with temporary files in the local `folder`."""
        self._allocation, self._ranks_per_node, self._folder = allocation, ranks_per_node, folder

    def start(self, assignment: Assignment, consoles: Sequence[Path]) -> StepProcesses:
        """Start the ranks of a fold.

        Raises:
            StartError: srun can't be run, or the file for its output can't be created.
        """
        step = render_step(
            f"fold{assignment.fold}",
            assignment.ranks[0].argv,
            str(consoles[0]).removesuffix("0.txt"),
            self._allocation.nodes,
            self._ranks_per_node,
            self._allocation.cpus_per_node // self._ranks_per_node,
        )
        # Of the job's variables, srun gets only the ID: those left by a shell in another job would restrict the step.
        environment = drop_job_variables(os.environ) | {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"], LAUNCHED: LAUNCH}
        environment |= assignment.ranks[0].environment  # each rank sets its own RANK and LOCAL_RANK
        environment |= {"LOCAL_WORLD_SIZE": str(self._ranks_per_node)} | _choose_meeting_port()
        output = self._folder / f"fold{assignment.fold}.{time.monotonic_ns()}.txt"
        try:
            consoles[0].parent.mkdir(parents=True, exist_ok=True)
            with output.open("wb") as file:
                srun = subprocess.Popen(
                    step,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,  # only this process receives the job's signals, and forwards them
                )
        except OSError as error:
            raise StartError(f"fold {assignment.fold} can't be started: {error}") from error
        return StepProcesses(srun, len(assignment.ranks), output)


def _choose_meeting_port() -> dict[str, str]:
    """Choose a free port of this machine at which the ranks meet."""
    with socket.socket() as server:
        server.bind(("", 0))
        return {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(server.getsockname()[1])}


class PreemptionWatch:
    """Watch on the sleeping step, which asks this process to stop when Slurm sends a signal to the job's steps."""

    def __init__(self, srun: "subprocess.Popen[bytes]") -> None:
        self._srun, self._has_ended = srun, False
        self._waiter = threading.Thread(target=self._wait, name="doccls-preemption", daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        number = _STOP_SIGNALS.get(self._srun.wait())
        if number is not None and not self._has_ended:
            agree_to_stop(number)  # sends no signal: the next real one would be the second, and end it at once

    def join(self) -> None:
        """Wait until the step has ended."""
        self._waiter.join()

    def end(self) -> None:
        """End the step, and ignore how it ends."""
        self._has_ended = True
        self._srun.terminate()
        try:
            self._srun.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._srun.kill()


@contextmanager
def watching_for_preemption() -> Iterator[PreemptionWatch | None]:
    """Watch for preemption within the block, in a Slurm job; yield None where srun can't be run, as in a container.

    A step that can't be started is not an error: the task then learns of a preemption at the end of its grace time.
    """
    environment = drop_job_variables(os.environ) | {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"]}
    try:
        srun = subprocess.Popen(
            _SLEEPING_STEP, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # it does not receive signals to the job's batch script
        )  # fmt: skip
    except OSError:
        yield None
        return
    watch = PreemptionWatch(srun)
    try:
        yield watch
    finally:
        watch.end()
