"""eval/reproduce_foem_table.sh without a GPU: what it measured with other settings is not printed as measured with these."""
import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).parent.parent / "eval/reproduce_foem_table.sh"


def run(out: pathlib.Path, **settings) -> subprocess.CompletedProcess:
    """FOEM=true: every command succeeds and does nothing, so no perplexity is found."""
    env = {**os.environ, "FOEM": "true", "OUT": str(out), "MODELS": "owner/model", **settings}
    return subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True)


def test_results_of_other_settings_are_refused(tmp_path):
    first = run(tmp_path, SAMPLES="64")
    assert first.returncode == 1 and "holds no word_perplexity" in first.stderr
    other = run(tmp_path, SAMPLES="256")
    assert other.returncode == 1 and "SAMPLES=64" in other.stderr and "choose another OUT" in other.stderr
    assert "holds no word_perplexity" in run(tmp_path, SAMPLES="64").stderr
