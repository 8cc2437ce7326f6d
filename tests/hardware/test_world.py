"""Rank variables of every launcher: read, nested, contradictory, with random numbers; hosts and addresses for ranks to meet."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.errors import ConfigError
from gptoughts.hardware.endpoint import PORTS, Endpoint, endpoint, first_host, hosts
from gptoughts.hardware.world import (
    LAUNCHERS,
    SRUN,
    TORCHRUN,
    Launcher,
    World,
    is_quiet,
    shares_errors,
    tasks_of_node,
    world_from_environment,
)

NUMBERS = st.integers(0, 40)


def variables(name: str, rank: int, size: int, local: int, local_size: int) -> dict[str, str]:
    """What a launcher sets for one rank of machines with `local_size` ranks each."""
    launcher = next(launcher for launcher in LAUNCHERS if launcher.name == name)
    found = dict(zip(launcher.variables, map(str, (rank, size, local, local_size)), strict=True))
    if launcher is SRUN:
        found |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}
        found[SRUN.local_world_size] = f"{local_size}(x{max(1, size // local_size)})"
    return found


@given(st.sampled_from(LAUNCHERS), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_every_launcher_is_read_or_refused(launcher: Launcher, rank: int, size: int, local: int, local_size: int) -> None:
    name = launcher.name
    local_size = max(1, local_size)
    given = variables(name, rank, size, local, local_size)
    if rank < size and local < local_size <= size and local <= rank:
        found = world_from_environment(given)
        single = name == "srun" and size == 1
        assert found == (World() if single else World(rank, local, size, local_size, name))
    else:
        with pytest.raises(ConfigError) as raised:
            world_from_environment(given)
        assert launcher.rank in str(raised.value)


@pytest.mark.parametrize(
    ("more", "own"),
    [
        ({}, False),
        ({"SLURM_GPUS_PER_TASK": "1"}, True),
        ({"SLURM_TRES_PER_TASK": "cpu:2,gres/gpu:1"}, True),
        ({"SLURM_TRES_PER_TASK": "cpu:2"}, False),
        ({"SLURM_GPU_BIND": "single:1"}, True),
        ({"SLURM_GPU_BIND": "verbose,per_task:1"}, True),
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"}, False),
        ({"SLURM_GPUS_PER_NODE": "4"}, False),
    ],
)
def test_a_task_with_gpus_of_its_own_is_known(more: dict[str, str], own: bool) -> None:
    assert world_from_environment(variables("srun", 1, 4, 1, 4) | more).own_gpus is own
    inside = variables("torchrun", 1, 4, 1, 4) | variables("srun", 0, 1, 0, 1) | more
    assert not world_from_environment(inside).own_gpus, "torchrun's ranks see what the task sees"


@given(st.sampled_from(LAUNCHERS[:3]), st.integers(0, 3))
def test_a_missing_variable_is_named(launcher: Launcher, missing: int) -> None:
    given = variables(launcher.name, 1, 2, 1, 2)
    name = launcher.variables[missing]
    del given[name]
    with pytest.raises(ConfigError, match=f"without {name}"):
        world_from_environment(given)


@given(st.dictionaries(st.sampled_from([name for launcher in LAUNCHERS for name in launcher.variables]), st.text(max_size=8)))
def test_hostile_values_raise_one_kind_of_error(environment: dict[str, str]) -> None:
    try:
        world = world_from_environment(environment)
    except ConfigError:
        assert isinstance(is_quiet(environment), bool)
    else:
        assert 0 <= world.rank < world.world_size and is_quiet(environment) == (world.rank > 0)


def test_plain_python_and_a_batch_script_are_single_processes() -> None:
    assert world_from_environment({"PATH": "/bin"}) == World()
    batch = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "8",
        "SLURM_TASKS_PER_NODE": "4(x2)",
    }
    assert world_from_environment(batch) == World()
    shell = {**variables("srun", 0, 1, 0, 1), "SLURM_NTASKS": "8"}
    assert world_from_environment(shell) == World(), "the shell of srun --pty"


def test_the_innermost_launcher_counts_where_the_outer_one_is_explained() -> None:
    inside = {**variables("torchrun", 5, 8, 1, 4), "GROUP_WORLD_SIZE": "2"}
    assert world_from_environment(inside | variables("srun", 1, 2, 0, 1)) == World(5, 1, 8, 4, "torchrun")
    assert world_from_environment(inside | variables("openmpi", 1, 2, 0, 1)) == World(5, 1, 8, 4, "torchrun")
    exported = variables("torchrun", 1, 2, 1, 2)  # export RANK=$SLURM_PROCID
    assert world_from_environment(exported | variables("srun", 1, 2, 1, 2)).launcher == "torchrun"
    daemons = variables("openmpi", 5, 8, 1, 4) | variables("srun", 1, 2, 0, 1)
    assert world_from_environment(daemons) == World(5, 1, 8, 4, "openmpi")
    pmi = variables("srun", 1, 2, 1, 2) | {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert world_from_environment(pmi) == World(1, 1, 2, 2, "srun")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (variables("torchrun", 0, 2, 0, 2) | variables("srun", 3, 4, 1, 2), ["RANK=0", "WORLD_SIZE=2", "SLURM_PROCID=3", "unset RANK"]),
        (variables("torchrun", 0, 2, 0, 2) | variables("openmpi", 1, 2, 1, 2), ["OMPI_COMM_WORLD_RANK=1", "WORLD_SIZE=2"]),
        (variables("openmpi", 0, 2, 0, 2) | variables("srun", 3, 4, 1, 2), ["OMPI_COMM_WORLD_SIZE=2", "SLURM_STEP_NUM_TASKS=4"]),
        (variables("srun", 1, 2, 1, 2) | {"PMI_RANK": "0", "PMI_SIZE": "2"}, ["PMI_RANK=0", "SLURM_PROCID=1"]),
        (variables("torchrun", 2, 2, 0, 1), ["RANK < WORLD_SIZE", "RANK=2"]),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, ["RANK='x': not a whole number"]),
    ],
)  # fmt: skip
def test_launchers_that_disagree_are_named_with_their_values(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        world_from_environment(environment)
    for word in words:
        assert word in str(raised.value)


def test_one_rank_of_a_machine_prints_what_all_find() -> None:
    wrong = [variables("torchrun", rank + 2, 2, rank, 2) for rank in (0, 1)]
    assert [shares_errors(found) for found in wrong] == [False, True]
    assert [shares_errors(variables("openmpi", rank, 4, rank % 2, 2)) for rank in range(4)] == [False, True, False, True]


def test_tasks_of_a_node() -> None:
    assert [tasks_of_node("2(x3),1", str(node)) for node in range(4)] == ["2", "2", "2", "1"]
    assert tasks_of_node("2(x3),1", "4") == "2(x3),1", "left as it is, which is no number"


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,3}", fullmatch=True), st.integers(0, 990), st.integers(0, 9), st.booleans()),
        min_size=1,
    )
)
def test_compressed_host_lists(parts: list[tuple[str, int, int, bool]]) -> None:
    written, expected = [], []
    for prefix, low, more, padded in parts:
        form = "{:04d}" if padded else "{}"
        numbers = [form.format(number) for number in range(low, low + more + 1)]
        expected += [prefix + number for number in numbers]
        written.append(f"{prefix}[{numbers[0]}-{numbers[-1]}]" if more else prefix + numbers[0])
    assert hosts(",".join(written)) == expected
    assert first_host(",".join(written)) == expected[0]


def test_host_lists_with_several_ranges_and_bad_ones() -> None:
    assert hosts("n[1-3,7],m2") == ["n1", "n2", "n3", "n7", "m2"]
    assert hosts("r[1-2]n[08-09]x") == ["r1n08x", "r1n09x", "r2n08x", "r2n09x"]
    for bad in ("", "n[1-", "n[3-1]", "n[a]", "n1,,n2", "n1,", "n[1-99999999999]", "n[0-9999][0-9999]", "n[]"):
        with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
            hosts(bad)


@given(st.text(max_size=30))
def test_hostile_host_lists(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert hosts(text)


def test_where_ranks_meet() -> None:
    far = World(1, 0, 4, 2, "srun")
    step = {"SLURM_JOB_ID": "70001", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "n[3-4]"}
    place = endpoint(far, step)
    assert (place.address, place.serves) == ("n3", False) and place.port in PORTS
    assert endpoint(far, step | {"SLURM_STEP_ID": "2"}).port != place.port, "two steps of a job run at once"
    assert "SLURM_STEP_NODELIST=n[3-4]" in place.source
    assert endpoint(World(0, 0, 2, 2, "srun"), step).address == "127.0.0.1"
    given = endpoint(far, step | {"MASTER_ADDR": "here", "MASTER_PORT": "4000"})
    assert given == Endpoint("here", 4000, "MASTER_ADDR=here, MASTER_PORT=4000", serves=False)
    assert endpoint(World(0, 0, 2, 2, "openmpi"), {}).file == endpoint(World(1, 1, 2, 2, "openmpi"), {}).file
    agent = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert not endpoint(World(0, 0, 2, 2, TORCHRUN.name), agent).serves, "torchrun's agent listens"


@pytest.mark.parametrize(
    ("world", "environment", "words"),
    [
        (World(0, 0, 4, 2, "openmpi"), {}, "MASTER_ADDR: not set, and mpirun started ranks on several machines"),
        (World(0, 0, 2, 2, "torchrun"), {}, "MASTER_ADDR: not set"),
        (World(0, 0, 2, 2, "torchrun"), {"MASTER_ADDR": "h", "MASTER_PORT": "99999"}, "MASTER_PORT: must be a whole number"),
        (World(0, 0, 4, 2, "srun"), {"SLURM_JOB_ID": "7"}, "SLURM_STEP_NODELIST: not set"),
    ],
)
def test_an_unknown_address_is_an_error(world: World, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        endpoint(world, environment)
