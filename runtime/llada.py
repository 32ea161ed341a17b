"""What LLaDA's folder says of itself: config.json and the index of its shards."""

import json
import os
from pathlib import Path

from runtime.errors import UserError, first_line


def read_json(folder, name):
    """A JSON file that LLaDA's folder must have: an object."""
    try:
        content = json.loads(Path(folder, name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{folder}: no {name} that can be read ({first_line(e)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder}: {name} is not a JSON object")
    return content


def check_llada(folder, config):
    """Raises UserError unless config.json describes the network that this code has."""
    published = read_json(folder, "config.json")
    # other models' folders have the same file names: say so at once, not by the first shape that differs
    kind = published.get("model_type")
    if kind != "llada":
        raise UserError(f"{folder}: holds a model of type {kind!r}; this code runs LLaDA-8B")
    # no shape tells these: with other values the weights would load, and answer nonsense
    expected = {
        "n_heads": config.heads,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
    }
    for field, ours in expected.items():
        found = published.get(field, ours)
        if found != ours:
            raise UserError(f"{folder}: config.json has {field} {found}, not {ours}")


def shards_of(folder):
    """Paths of the shards that the index names; all are there."""
    shard_of = read_json(folder, "model.safetensors.index.json").get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f"{folder}: model.safetensors.index.json is not an index of shards")
    paths = {shard: os.path.join(folder, shard) for shard in sorted(set(shard_of.values()))}
    for shard, path in paths.items():
        if not os.path.isfile(path):
            raise UserError(f"{folder}: the index names {shard}, which is not there")
    return list(paths.values())
