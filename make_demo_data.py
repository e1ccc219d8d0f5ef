"""Make simulated Sentinel-2 tiles, so that everything runs on a fresh machine with no download.

SIMULATED: good for trying things out, not for saying anything about the Earth.

    python make_demo_data.py
    python make_demo_data.py base_path=/tmp/demo num_tiles=8 size=256
    python make_demo_data.py year=2025 dataset_name=simulated_2025
"""

from pathlib import Path

from running.config import check
from running.script import refuse_torchrun, run_script

from preparation.simulated import simulate_dataset

run_config = {
    "base_path": ".",  # tiles go to <base_path>/data/<dataset_name>/processed/MGRS-SIM<n>
    "dataset_name": "simulated",  # must be new
    "num_tiles": 3,  # each is another landscape
    "size": 96,  # pixels along a side
    "year": 2024,  # another: same ground, other weather and dates; changed.npy: where cover changed
    "num_dates": 60,  # of the 73 overpasses of a year
    "missed_clouds": 0.1,  # share of cloud edges that the mask calls clear
    "seed": 0,  # of landscapes, dates and clouds
}


def main(config):
    """Write the data set; returns its folder. Raises InputError where it exists already."""
    refuse_torchrun()
    config = dict(check(config, year=(2015, 2100)))
    folder = Path(config.pop("base_path")) / "data" / config.pop("dataset_name")
    simulate_dataset(folder, **config)
    return folder


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
