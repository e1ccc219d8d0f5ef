"""Which pixels an encoder has been trained on, so that scores on others can be honest.

A checkpoint has {tile: fingerprints of the splits} that it was trained with. A tile whose split is
another one now may test pixels that the encoder has seen.
"""

import hashlib

from running.errors import notice


def hash_split(split):
    """Fingerprint of the split of a tile's pixels, (H, W) uint8 of `Tile.split_map`."""
    return hashlib.sha256(split).hexdigest()[:12]


def record_splits(dataset, checkpoint=None):
    """{tile: [fingerprints of its splits]} of a data set to train on, and of an earlier training.

    checkpoint: that the training starts from, or None.
    """
    seen = read_splits(checkpoint)
    own = {tile: [*seen.get(tile, ()), split] for tile, split in dataset.split_hashes.items()}
    return seen | {tile: sorted(set(splits)) for tile, splits in own.items()}


def notice_seen_pixels(dataset, checkpoint, checkpoint_path):
    """Print which tiles had another split when the checkpoint's encoder was trained."""
    seen, now = read_splits(checkpoint), dataset.split_hashes
    changed = [tile for tile in now if set(seen.get(tile, ())) - {now[tile]}]
    if changed:
        notice(
            f"{checkpoint_path}: found that it was trained with another split of {len(changed)} of "
            f"{len(now)} tiles (first {changed[0]}; a new splits.npy, or labels or crs that came "
            "later?), so it may have seen test pixels; wanted an encoder trained with this split"
        )


def read_splits(checkpoint):
    """The splits in a checkpoint; {} for None, and for one that lacks them or is damaged."""
    splits = checkpoint.get("splits") if checkpoint else None
    is_right = isinstance(splits, dict) and all(isinstance(s, list) for s in splits.values())
    return splits if is_right else {}
