"""The ablation's variants differ in what they say they do, and a stopped ablation goes on."""

from dataclasses import replace
from pathlib import Path

import ablation
import pytest
import torch
from ablation_report import Difference, report
from ablation_variants import SMALL, VARIANTS, Small, build, kept_bytes
from torch.testing import assert_close

from vggt_cli.models.mini import Mini
from vggt_cli.models.omega import Aggregator

TINY = replace(SMALL, embed_dim=32, heads=2, depth=1, cached_layers=(0, 0, 0, 0), head_heads=2)
NAMED = {variant.name: variant for variant in VARIANTS}
SETTING = ablation.Setting(steps=3, pixels=48, frames=(2,), batch_frames=2, held_out=2, config=TINY)


def made(name: str) -> Small:
    return build(NAMED[name], TINY, seed=0)[0]


def photos() -> torch.Tensor:
    return torch.rand(1, 3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def test_ways_of_attention_have_the_same_parameters_and_fresh_weights() -> None:
    baseline = made("baseline").state_dict()
    for name in ("global only", "frame only"):
        other = made(name).state_dict()
        assert other.keys() == baseline.keys()
        for key, value in baseline.items():
            assert_close(other[key], value, rtol=0, atol=0)


def test_other_variants_share_the_fresh_weights_that_fit() -> None:
    baseline = made("baseline").state_dict()
    for name in ("0 registers", "16 registers", "full-resolution convolutions"):
        other = made(name).state_dict()
        same = {key for key in other if key in baseline and baseline[key].equal(other[key])}
        own = {key.removeprefix("depth_head.").split(".")[1] for key in baseline.keys() ^ same}
        assert own <= {"register_token", "proj", "proj_conf", "narrow", "refine", "logits"}, own


@torch.inference_mode()
def test_the_baseline_attends_as_mini_does() -> None:
    network = made("baseline")
    tokens = torch.rand(2, 3, 12, TINY.embed_dim, generator=torch.Generator().manual_seed(0))
    ours = network.aggregator.attend(tokens, (3, 4))
    theirs = Aggregator.attend(network.aggregator, tokens, (3, 4))
    assert_close(ours[0], theirs[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["no matches, frame only", "no matches", "frame only"])
@torch.inference_mode()
def test_depth_of_a_frame_needs_no_other_only_without_attention_and_matches(name: str) -> None:
    network, images = made(name), photos()
    mirrored = images.flip(-1)
    others = torch.stack([mirrored[:, 0], images[:, 1], mirrored[:, 2]], 1)
    before, after = network(images).depth[:, 1], network(others).depth[:, 1]
    assert torch.allclose(before, after) == (name == "no matches, frame only")


@torch.inference_mode()
def test_poses_are_those_of_the_head_alone() -> None:
    network = made("baseline")
    outputs = network(photos())
    assert outputs.pose_passes[0].equal(outputs.pose_passes[1])
    whole = Mini(TINY)
    whole.load_state_dict(network.state_dict(), strict=False)
    assert_close(whole(photos()).pose_passes[0], outputs.pose_passes[0])


def test_convolutions_at_full_resolution_keep_more_for_the_way_back() -> None:
    shuffled, convolved = made("baseline"), made("full-resolution convolutions")
    more = kept_bytes(convolved) - kept_bytes(shuffled)
    # Their output has 32 channels of float32 for each of the eight frames' pixels.
    assert more > 32 * 4 * 8 * 128**2


def test_differences_have_students_interval() -> None:
    d = Difference.of({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0})
    assert d.each == [1.0, 3.0, 5.0]
    assert d.reach == pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3)
    assert d.words(1, False) == "+3.0 ± 5.0 no effect seen"
    assert d._replace(reach=1.0).words(1, False) == "+3.0 ± 1.0 worse"
    assert d._replace(reach=1.0).words(1, True) == "+3.0 ± 1.0 better"


def test_a_second_call_takes_finished_runs_as_they_are(tmp_path: Path) -> None:
    chosen = [NAMED["baseline"], NAMED["frame only"]]
    first = ablation.ablate(chosen[:1], 1, SETTING, 1, tmp_path)
    runs = ablation.ablate(chosen, 1, SETTING, 1, tmp_path)
    assert [run["variant"] for run in runs] == ["baseline", "frame only"]
    assert runs[0] == first[0]
    assert runs[0]["parameters"] == runs[1]["parameters"]
    assert runs[0]["constant"] == runs[1]["constant"]  # the same scenes
    text = report(runs, {v.name: v.beside for v in chosen}, tmp_path).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| frame only")]
    assert len(rows) == 2
    assert f"{runs[0]['parameters']:,}" in rows[0]
    assert "(one seed)" in rows[1]
    assert (tmp_path / "ablation.png").stat().st_size > 5_000
    with pytest.raises(SystemExit, match="another setting"):
        ablation.ablate(chosen, 1, replace(SETTING, steps=4), 1, tmp_path)
