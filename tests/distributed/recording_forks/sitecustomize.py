"""Record each fork of an interpreter that has this folder on its PYTHONPATH, with its number of threads."""

import os


def _record_fork() -> None:
    with open(os.environ["DOCCLS_TEST_FOLDER"] + "/forks.txt", "a") as file:  # noqa: PTH123 (at the start of any Python)
        file.write(f"{os.getpid()} {len(os.listdir('/proc/self/task'))}\n")  # noqa: PTH208


os.register_at_fork(before=_record_fork)
