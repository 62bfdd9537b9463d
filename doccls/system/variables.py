"""Environment variables that batch systems, MPI, torchrun and Accelerate set: read as whole numbers, or as absent."""

from collections.abc import Mapping, MutableMapping

from doccls.errors import UserError

_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME", "FORK_LAUNCHED",
)  # fmt: skip
_PREFIXES = (
    "ACCELERATE_", "TORCHELASTIC_", "SLURM_", "PBS_", "LSB_", "SGE_", "OMPI_", "PMI_", "PMIX_", "MPI_", "MV2_COMM_",
    "JOB_COMPLETION_",
)  # fmt: skip
_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK")
_TRUE, _FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")  # as Accelerate reads them


def drop_empty_variables(environment: MutableMapping[str, str]) -> None:
    """Remove the variables of launchers and batch systems that are exported but empty: they count as absent.

    Templates of job scripts export them so, and torch and Accelerate would read them as numbers. A rank of -1 means the
    same. An empty CUDA_VISIBLE_DEVICES hides all GPUs, and stays.
    """
    for name, value in list(environment.items()):
        is_empty = not value.strip() and (name in _NAMES or name.startswith(_PREFIXES))
        if is_empty or (name in _RANKS and value.strip() == "-1"):
            del environment[name]


def parse_whole_number(environment: Mapping[str, str], name: str, default: int, at_least: int = 0) -> int:
    """Return the variable's value, or `default` if it is absent or empty.

    Raises:
        UserError: it is not a whole number of at least `at_least`.
    """
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or int(text) < at_least:
        raise UserError(f"the environment variable {name}={text!r} must be a whole number from {at_least}, or unset")
    return int(text)


def parse_flag(environment: Mapping[str, str], name: str) -> bool:
    """Return whether the variable is set to a word for true, as Accelerate reads it; an absent one is false.

    Raises:
        UserError: it is a word for neither true nor false.
    """
    text = environment.get(name, "").strip()
    if text.lower() in _TRUE:
        return True
    if not text or text.lower() in _FALSE:
        return False
    raise UserError(f"the environment variable {name}={text!r} must be true or false, or unset")
