"""A whole run with views made in batches is the run with the CPU's views, to the last bit of its weights."""

from pathlib import Path

import pytest
from tiny import contents, records

from coadvise import UserError, build_cache, fit
from coadvise.distill.logit_cache import LogitCache

PHOTOS = Path(__file__).parents[1] / "photos"
VIEWS = [
    "data.image_size=32", "data.presize=48", "augment.kind=deit", "augment.erase=0.3", "augment.mixup=0.8",
    "augment.cutmix=1", "engine.device=cpu",
]  # fmt: skip


def test_a_run_is_the_same_wherever_its_views_are_made(tiny_preset: str, tmp_path: Path) -> None:
    runs = {
        where: fit(PHOTOS, tiny_preset, tmp_path / where, overrides=[*VIEWS, f"data.views={where}"])
        for where in ("cpu", "device")
    }
    weights = [
        {name: content for name, content in contents(run).items() if name.endswith("model.safetensors")}
        for run in runs.values()
    ]
    assert len(weights[0]) == 3
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match=r"it differs in data\.views"):
        fit(PHOTOS, tiny_preset, tmp_path / "device", overrides=[*VIEWS, "data.views=cpu"])
    losses = [[record["losses"] for record in records(run, "train")] for run in runs.values()]
    assert losses[0] == losses[1]
    caches = [LogitCache(build_cache(run, tmp_path / f"cache-{name}") / "seed-0", {}) for name, run in runs.items()]
    for epoch in (0, 1):
        one, other = (cache.read(epoch) for cache in caches)
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)
