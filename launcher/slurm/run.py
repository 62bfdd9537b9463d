"""`doccls-launch run --backend slurm`: the submission of a run, and the wait for its end."""

from contextlib import ExitStack
from datetime import datetime

from doccls.config import Config
from doccls.errors import UserError
from doccls.experiment import log_config
from doccls.reporting.log import RunLog
from doccls.system.signals import stopping_gracefully
from launcher.slurm.submit import SubmitOptions, open_submitted_run, read_queue_of, submit_missing
from launcher.slurm.watch import Watch
from launcher.status import list_unfinished
from launcher.status_files import read_status
from launcher.task import close_share


def submit(config: Config, run_id: str, now: datetime, options: SubmitOptions, wait: bool, log: RunLog) -> None:
    """Check config and data, open the run, and submit its folds that are neither finished nor pending or running.

    With `wait`, return when the run has ended, not when it is submitted.

    Raises:
        UserError: config, data, Slurm or a launcher of the run prevent it; with `wait` also if folds failed.
        Interrupted: a signal arrived; submitted jobs continue.
    """
    log_config(config, log)
    with ExitStack() as held:
        missing = open_submitted_run(config, run_id, now, options, 0, log, held)
        submit_missing([missing], read_queue_of([missing]), options, log)
    run = missing.run
    log.line(f"[SLURM] show status: doccls-launch status {run.paths.root}")
    log.line(f"[SLURM] cancel:      doccls-launch cancel {run.paths.root}")
    if not wait:
        if set(config.data.list_wanted()) - set(run.experiment.find_finished()):
            log.end_as("SUBMITTED", "submitted")
        return
    with stopping_gracefully():
        Watch([run], options, log).run()
    if close_share(run.experiment, log):
        unfinished = "\n".join(list_unfinished(read_status(run.paths)))
        raise UserError(
            f"the run has ended, but folds are missing\n{unfinished}\nto train them: {options.resume_command}"
        )
