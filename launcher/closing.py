"""The end of a launch that is one of several of its run: who comes last merges."""

from doccls.experiment import Experiment, close_run, log_done
from doccls.oof.merge import load_merged
from doccls.oof.predictions import is_merged
from doccls.oof.summary import list_scores
from doccls.reporting.log import RunLog
from doccls.system.lock import hold_lock
from launcher.status import list_unfinished
from launcher.survey import read_status

_MERGING_S = 600.0
"""How long another one's merge may take."""


def close_share(experiment: Experiment, log: RunLog) -> bool:
    """Merge the run if it is whole, and nobody has; else say what is missing. Whether it is whole.

    Two that come at once do it in turn, and the second finds it done.
    """
    paths = experiment.paths
    whole = len(experiment.find_finished()) == experiment.config.data.folds
    if whole:
        with hold_lock(paths.merge_lock, f"run {paths.run_id} is being merged", wait_s=_MERGING_S):
            if not is_merged(paths):
                close_run(experiment, log)
                return True
        log.line(f"[OOF] merged before: {paths.oof_logits}")
        for line in list_scores(load_merged(paths)[1]):
            log.line(line)
    else:
        log.line("[OOF] not merged: whoever finishes last merges; what is not done now:")
        for line in list_unfinished(read_status(paths)):
            log.line(line)
    log_done(paths, log)
    return whole
