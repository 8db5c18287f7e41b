"""The FSDP2 configuration trains as one process does; on CPUs, where accelerate alone would take it for DDP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from planted import Planted, make_args, make_selector
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback

from lever_grpo import GroupBeamGRPOTrainer


TESTS = Path(__file__).resolve().parents[1]
CONFIG = TESTS.parent / "accelerate_configs" / "fsdp2.yaml"


def train_on(folder: Path, sharded: bool) -> dict:
    planted = Planted()
    args = make_args(folder, per_device_train_batch_size=4 if sharded else 8, learning_rate=2e-3, adaptive_beta=True)
    if sharded:  # accelerate asks for FSDP where it has found GPUs alone; all behind that runs on CPUs too
        PartialState().distributed_type = DistributedType.MULTI_GPU
    data = (planted.collator, planted.train, planted.validation)
    trainer = GroupBeamGRPOTrainer(make_selector(similarity_prior=True), args, *data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shards = sum(isinstance(value, DTensor) for value in trainer.model_wrapped.parameters())
    trainer.save_model(str(folder / "saved"))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "kind": trainer.accelerator.distributed_type,
        "processes": trainer.accelerator.num_processes,
        "sharded": shards / len(list(trainer.model_wrapped.parameters())),
        "log": trainer.state.log_history,
        "weights": {name: value.tolist() for name, value in weights.items() if "k_proj.bias" not in name},
    }


@pytest.mark.slow
def test_two_processes_with_fsdp2_equal_one(tmp_path):
    launched = launch_command_parser().parse_args([f"--config_file={CONFIG}", "script.py"])
    options = prepare_multi_gpu_env(_validate_launch_command(launched)[0])
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {name: value for name, value in options.items() if "FSDP" in name}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "result.json").read_text())
    assert (two["kind"], two["processes"], two["sharded"]) == ("FSDP", 2, 1.0)
    one = train_on(tmp_path / "one", sharded=False)
    assert len(one["log"]) == len(two["log"])
    for a, b in zip(one["log"][:-1], two["log"][:-1], strict=True):
        for name in a:
            if not name.endswith(("runtime", "per_second")):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    for name, value in one["weights"].items():
        torch.testing.assert_close(torch.tensor(two["weights"][name]), torch.tensor(value), rtol=0, atol=1e-5)
    sizes = [(tmp_path / side / "saved" / "model.safetensors").stat().st_size for side in ("one", "two")]
    assert sizes[0] == sizes[1]


if __name__ == "__main__":  # what each of the two processes runs
    result = train_on(Path(sys.argv[1]) / "two", sharded=True)
    if int(os.environ["RANK"]) == 0:
        Path(sys.argv[1], "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
