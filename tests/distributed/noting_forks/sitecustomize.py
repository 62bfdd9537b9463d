"""Read by each interpreter with this folder on its PYTHONPATH: it notes its forks, and how many threads it has then."""

import os


def _note() -> None:
    with open(os.environ["DOCCLS_TEST_FOLDER"] + "/forks.txt", "a") as file:  # noqa: PTH123 (at the start of any Python)
        file.write(f"{os.getpid()} {len(os.listdir('/proc/self/task'))}\n")  # noqa: PTH208


os.register_at_fork(before=_note)
