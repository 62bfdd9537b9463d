"""Variables of launchers and batch systems: empty ones count as absent, others must be numbers."""

import pytest
from accelerate.utils.environment import str_to_bool

from doccls.errors import UserError
from doccls.system.rank import MEETING_FILE, check_group_variables, has_meeting_address, rank_by_environment
from doccls.system.variables import drop_empty_variables, parse_flag, parse_whole_number

PAIR = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}


def test_empty_variables_count_as_absent_except_hidden_gpus() -> None:
    empty = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "SLURM_JOB_ID")
    environment = dict.fromkeys(empty, "") | {"GROUP_RANK": " ", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    drop_empty_variables(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", "LOCAL_WORLD_SIZE": "2"}


def test_ranks_of_minus_one_count_as_absent() -> None:
    environment = {"RANK": "-1", "LOCAL_RANK": " -1", "GROUP_RANK": "-1", "WORLD_SIZE": "-1", "SLURM_PROCID": "-1"}
    drop_empty_variables(environment)
    assert environment == {"WORLD_SIZE": "-1", "SLURM_PROCID": "-1"}


@pytest.mark.parametrize("port", ["tcp://10.0.0.1:29500", "70000"])
def test_port_matters_only_to_several_processes(port: str) -> None:
    check_group_variables({"MASTER_ADDR": "h", "MASTER_PORT": port})
    with pytest.raises(UserError, match="MASTER_PORT="):
        check_group_variables(PAIR | {"MASTER_PORT": port})


def test_address_for_a_group_of_one_has_a_port() -> None:
    assert has_meeting_address({"MASTER_ADDR": "h", "MASTER_PORT": "29500"})
    for environment in ({"MASTER_ADDR": "h"}, {"MASTER_PORT": "1"}, {"MASTER_ADDR": "h", "MASTER_PORT": "tcp://h:1"}):
        assert not has_meeting_address(environment)


def test_number_is_parsed_or_refused_by_name() -> None:
    assert parse_whole_number({"A": " 3 "}, "A", 7) == 3
    assert parse_whole_number({"A": ""}, "A", 7) == parse_whole_number({}, "A", 7) == 7
    for text in ("two", "-1", "1.5", "0x1", "²", "٣"):
        with pytest.raises(UserError, match=r"^the environment variable A='.*' must be a whole number from 0"):
            parse_whole_number({"A": text}, "A", 7)
    with pytest.raises(UserError, match="must be a whole number from 1"):
        parse_whole_number({"A": "0"}, "A", 7, at_least=1)


def test_flag_is_read_as_accelerate_does() -> None:
    for text in ("1", "true", "True", "yes", "on", "y", "t", "0", "false", "no", "off", "n", "f"):
        assert parse_flag({"A": text}, "A") == bool(str_to_bool(text))
    assert not parse_flag({}, "A") and not parse_flag({"A": ""}, "A")


def test_rank_without_a_number_reports_errors_as_rank_0() -> None:
    assert [rank_by_environment(value) for value in ({}, {"RANK": ""}, {"RANK": "x"}, {"RANK": "3"})] == [0, 0, 0, 3]


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, PAIR])
def test_possible_groups_are_accepted(environment: dict[str, str]) -> None:
    check_group_variables(environment)
    check_group_variables({"WORLD_SIZE": "3", "RANK": "2", MEETING_FILE: "/tmp/file"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT"])
def test_variable_that_is_no_number_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"the environment variable {name}='node1' must be a whole number"):
        check_group_variables(PAIR | {name: "node1"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "2"}, "the environment has RANK=2, but WORLD_SIZE=2: processes are numbered from 0"),
        ({"LOCAL_RANK": "5"}, "the environment has LOCAL_RANK=5, but WORLD_SIZE=2"),
        ({"WORLD_SIZE": ""}, "RANK=1, but WORLD_SIZE="),
        ({"RANK": ""}, "WORLD_SIZE=2, but RANK is not set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT are not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: a port is at most 65535"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU='maybe' must be true or false"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS='many' must be"),
    ],
)
def test_impossible_group_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_group_variables(PAIR | changes)
    assert message in str(caught.value)
