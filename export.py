"""Write a trained encoder for other software: ONNX, safetensors and JSON.

    python export.py checkpoint_path=checkpoints/landcover/best.pt
    python export.py checkpoint_path=checkpoints/simulated/best.pt output_dir=to_publish

model.onnx takes raw series (reflectance x 10000, days of year, clear or not) and gives the
embeddings that infer.py gives; of a fine-tuned checkpoint also class probabilities or the quantity.
model.safetensors has the weights, config.json what else is needed to build the network again. A
model.onnx whose embeddings differ from the checkpoint's by more than 1e-5 is not kept.
docs/export.md has examples without this repository. Needs pip install -r requirements-export.txt.
"""

import shutil

from running.config import check
from running.errors import InputError
from running.files import atomic_write, make_output_dir, write_json
from running.log import refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script

from preparation import need
from trained.card import CARD
from trained.encoder import Encoder
from trained.graph import TOLERANCE, describe_encoder, measure_differences, write_onnx

run_config = {
    "checkpoint_path": "",  # of train.py, train_classification.py or train_regression.py
    "output_dir": "",  # empty: exported/ beside the checkpoint
    "dates": 24,  # clear dates of a pixel that are read, at most, evenly spaced; 0: all
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


def write_weights(encoder, output_dir, max_dates):
    """model.safetensors and config.json. Returns the number of parameters."""
    from safetensors.torch import save  # of requirements-export.txt

    state = {name: part.contiguous() for name, part in encoder.module.state_dict().items()}
    with atomic_write(output_dir / "model.safetensors") as part:
        part.write_bytes(save(state))
    write_json(output_dir / "config.json", describe_encoder(encoder, max_dates))
    return sum(part.numel() for part in encoder.module.parameters())


def write_checked_onnx(encoder, path, max_dates):
    """model.onnx; returns its differences to the encoder. InputError where one is too large."""
    with atomic_write(path) as part:
        write_onnx(encoder, part, max_dates)
        differences = measure_differences(encoder, part, max_dates)
        for name, difference in differences.items():
            if not difference <= TOLERANCE[name]:
                raise InputError(
                    f"{path}: found a difference of {difference:.2g} in {name} to the checkpoint, "
                    f"wanted at most {TOLERANCE[name]:g}; the file is not kept"
                )
    return differences


def main(config):
    """Export. Returns the folder of the files."""
    refuse_torchrun()
    config = check(config)
    for package in ("safetensors", "onnxscript", "onnxruntime"):
        need(package, "requirements-export.txt")
    encoder = Encoder.load(config["checkpoint_path"], device="cpu")
    folder = encoder.path.parent
    output_dir = make_output_dir(config["output_dir"] or folder / "exported")
    refuse_training_folder(output_dir)
    path = output_dir / "model.onnx"
    differences = write_checked_onnx(encoder, path, config["dates"])
    found = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    print(f"{path}: largest difference to the checkpoint, of 400 random series: {found}")
    parameters = write_weights(encoder, output_dir, config["dates"])
    print(f"{output_dir / 'model.safetensors'}: {parameters} parameters; config.json describes it")
    if (folder / CARD).exists():
        with atomic_write(output_dir / "README.md") as part:
            shutil.copy(folder / CARD, part)
        print(f"{output_dir / 'README.md'}: the model card")
    log = start_log(config, "export", output_dir, encoder.runtime)
    log.line({"step": 0, **{f"difference_{name}": part for name, part in differences.items()}})
    log.finish()
    return output_dir


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
