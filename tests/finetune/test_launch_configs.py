"""The files of finetune/configs as Accelerate's launcher and plugins read them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from finetune.config.errors import InputError
from finetune.config.recipe import DEFAULT_RECIPE, read_recipe
from finetune.parallel.launch import check_launch, replicas
from finetune.storage.saving import resume_command

CONFIGS = Path(__file__).resolve().parents[2] / "finetune" / "configs"
KINDS = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "hsdp": "FSDP"}


def launched(name):
    """Arguments and environment that `accelerate launch --config_file` makes of a file."""
    parser = launch_command_parser()
    # A port that nothing listens on: the launcher looks.
    args = parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", "script.py"])
    args, *_ = _validate_launch_command(args)
    environment = prepare_simple_launcher_cmd_env(args)[1] if name == "one_gpu" else prepare_multi_gpu_env(args)
    return args, environment


def test_every_file_is_one_that_accelerate_loads_with_nothing_left_over():
    assert {path.stem for path in CONFIGS.iterdir()} == set(KINDS)
    for name, kind in KINDS.items():
        path = CONFIGS / f"{name}.yaml"
        config = load_config_from_file(str(path))
        assert config.distributed_type.value == kind
        assert config.mixed_precision == "bf16"
        known = {f"fsdp_{key.removeprefix('fsdp_')}" for key in config.fsdp_config} | set(config.parallelism_config)
        options = {action.dest for action in launch_command_parser()._actions}
        assert known <= options, known - options
        assert f"accelerate launch --config_file finetune/configs/{name}.yaml " in path.read_text()


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("ddp", 8), ("fsdp2", 8), ("hsdp", 16)])
def test_the_launcher_starts_as_many_processes_of_that_kind(name, processes):
    args, environment = launched(name)
    assert args.num_processes == processes
    assert args.num_machines == (2 if name == "hsdp" else 1)
    assert bool(args.multi_gpu) == (name == "ddp")
    assert bool(args.use_fsdp) == (KINDS[name] == "FSDP")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true") == (name == "hsdp")


@pytest.mark.parametrize("name", ["fsdp2", "hsdp"])
def test_the_plugin_shards_by_fsdp2_layer_by_layer_and_saves_shards(name, monkeypatch):
    for key, value in launched(name)[1].items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
    if name == "hsdp":
        sizes = ParallelismConfig()
        assert (sizes.dp_replicate_size, sizes.dp_shard_size) == (2, 8)
        assert sizes.total_size == 16


def test_fsdp_that_accelerate_would_not_run_is_refused(monkeypatch):
    """Without a GPU it would be plain data parallelism, and nothing would say so."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, recipe = Accelerator(cpu=True), read_recipe(DEFAULT_RECIPE)
    check_launch(accelerator, recipe)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"--config_file: it asks for FSDP.* NO "):
        check_launch(accelerator, recipe)


@pytest.mark.parametrize(
    ("options", "num_asked"),
    [
        ("--cpu --config_file CONFIG --num_processes 2", 2),
        ("--cpu --config_file=CONFIG", 8),
        ("--cpu --num-processes=3", 3),
        ("--cpu --num_processes 1 --config_file CONFIG", 1),
        ("--quiet", 1),
    ],
)
def test_one_process_where_several_were_asked_for_is_refused(options, num_asked, monkeypatch):
    """Accelerate's launcher starts a single one on a CPU, and tells it nothing of a configuration that shards."""
    words = options.replace("CONFIG", str(CONFIGS / "fsdp2.yaml")).split()
    launcher = ["python", "-m", "accelerate.commands.launch", *words, "finetune/sft.py", "--num_processes", "9"]
    monkeypatch.setattr("finetune.parallel.launcher._words_of", lambda pid: launcher if pid == os.getppid() else [])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, recipe = Accelerator(cpu=True), read_recipe(DEFAULT_RECIPE)
    if num_asked == 1:
        check_launch(accelerator, recipe)
        return
    with pytest.raises(
        InputError, match=f"--num_processes: {num_asked} processes .*torchrun --nproc_per_node {num_asked}"
    ):
        check_launch(accelerator, recipe)


@pytest.mark.parametrize("processes", [4, 16])
def test_the_command_that_resumes_a_sharded_run_starts_as_many_processes(processes):
    """The files say 8 or 16, the user said --num_processes, and another number of processes cannot resume."""
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=DistributedType.FSDP)
    run = SimpleNamespace(accelerator=accelerator, folder=SimpleNamespace(path=Path("/a run")))
    command = shlex.split(resume_command(run, "pretrain.py"))
    assert command[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(command[2:])
    assert args.num_processes == processes
    assert [args.training_script, *args.training_script_args] == ["pretrain.py", "--resume", "/a run"]


def test_adapters_are_not_divided_among_replicas(monkeypatch):
    """Their matrices are too small to be worth sending."""
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD="all ranks"))
    accelerator = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    assert replicas(accelerator, SimpleNamespace()) == "all ranks"
    assert replicas(accelerator, SimpleNamespace(peft_config={})) is None
