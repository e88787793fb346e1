"""The store of teacher pairs: what was written is read, and whatever is not whole is named."""

import json

import pytest
import torch
from safetensors import safe_open

from stepdistill.data.pairs import begin, manifest, noise_of, read_pairs, write_shard
from stepdistill.errors import UserError
from stepdistill.sources import PAIRS, shards

SETTINGS = {"source": "stepdistill/tiny-sd", "guidance": 3.0, "steps": 4, "count": 5, "shard": 2}
SHAPE = (2, 3, 3)


@pytest.fixture
def folder(tmp_path):
    """Five pairs in three shards; the noise of pair i has seed 10 i, its end is i."""
    begin(tmp_path, SETTINGS)
    for name, part in zip(shards(SETTINGS), ([0, 1], [2, 3], [4]), strict=True):
        noise = torch.stack([noise_of(10 * i, SHAPE) for i in part])
        x0 = torch.tensor(part).float().reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
        write_shard(tmp_path / name, [f"prompt {i}, ö" for i in part], noise, x0, [10 * i for i in part])
    return tmp_path


def test_pairs_are_read_as_they_were_written(folder):
    assert sorted(p.name for p in folder.iterdir()) == [f"pairs-0000{k}.safetensors" for k in range(3)] + [PAIRS]
    prompts, noise, x0 = read_pairs(folder)
    assert prompts == [f"prompt {i}, ö" for i in range(5)]
    assert noise.shape == x0.shape == (5, *SHAPE) and x0[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(noise[3], torch.randn(SHAPE, generator=torch.Generator().manual_seed(30)))


def test_a_shard_tells_the_seeds_of_its_noise(folder):
    with safe_open(folder / "pairs-00001.safetensors", "pt") as file:
        seeds, noise = file.get_tensor("seed"), file.get_tensor("noise")
    assert seeds.dtype == torch.int64 and seeds.tolist() == [20, 30]
    for seed, z in zip(seeds.tolist(), noise, strict=True):
        assert torch.equal(z, torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))


def test_other_settings_are_refused_by_key_with_both_values(folder):
    begin(folder, SETTINGS)
    with pytest.raises(UserError, match=r"guidance was 3\.0 and is now 4\.0, seed was None and is now 1; set them back"):
        begin(folder, SETTINGS | {"guidance": 4.0, "seed": 1})
    assert manifest(folder)["guidance"] == 3.0


def test_what_is_missing_or_damaged_is_named(folder):
    shard = folder / "pairs-00001.safetensors"
    whole = shard.read_bytes()
    for cut in (0, 4, 60, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"pairs-00001\.safetensors is damaged .* remove it"):
            read_pairs(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"pairs-00001\.safetensors is missing"):
        read_pairs(folder)
    (folder / "pairs-00002.safetensors").rename(shard)  # a shard of fewer pairs
    (folder / "pairs-00002.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="holds 4 pairs, not 5"):
        read_pairs(folder)
    (folder / PAIRS).write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="another version"):
        read_pairs(folder)
    (folder / PAIRS).write_text("{")
    with pytest.raises(UserError, match=r"pairs\.json cannot be read"):
        begin(folder, SETTINGS)
