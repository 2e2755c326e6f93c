"""The benchmarks of pipelines, in small."""

import json

import pytest

pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow


def test_the_benchmark_of_calls_runs_in_small(run, tmp_path):
    code, out, err = run(f"bench diffusers --quick --plot {tmp_path}/plot.png")
    assert code == 0, err
    assert "0 of 1,120,548 changed" in out and (tmp_path / "plot.png").exists()


def test_the_benchmark_of_whole_pipelines_runs_in_small(run):
    """Whether it runs, and that LoRAs change the base where ours do not."""
    code, out, err = run("bench pipelines --quick")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    changed = {row["setup"]: row["base_values_changed"] for row in rows if "base_values_changed" in row}
    assert changed.keys() == {"SD-1.5 float32", "SDXL bfloat16", "many registered"}
    for by_kind in changed.values():
        assert all((count > 0) == (kind == "Diffusers LoRA") for kind, count in by_kind.items())
    sized = [row for row in rows if "mib" in row]
    assert all(row["numbers"]["shira"] == pytest.approx(row["numbers"]["Diffusers LoRA"], rel=0.02) for row in sized)
    assert {"a request, 2 registered", "a request, 6 registered"} < {row["setup"] for row in rows}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_the_benchmark_of_training_a_unet_runs_in_small(run):
    code, out, err = run("bench unet --quick")
    assert code == 0, err
    (row,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert row["parameters"]["shira wm"] == row["parameters"]["PEFT LoRA"] == row["parameters"]["PEFT LoRA, no dropout"] > 1e5
    assert row["ms"].keys() == row["peak_gib"].keys() == row["parameters"].keys()
