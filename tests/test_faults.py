"""Memory that runs out, sources that change, kills between the last renames; eval/faults.py does it all to whole processes."""

import io
import shutil

import pytest
import torch
from test_resume import SMALL, Stop, interrupted, weights_and_config
from tiny_models import write_model

from foem_vllm import QuantizeConfig, cli, command, distributed, memory, pipeline, quantize
from foem_vllm.errors import FoemError
from foem_vllm.stream import BlockInputs
from foem_vllm.writer import Writer

CONFIG = QuantizeConfig(**{**SMALL, "samples": 16})  # four batches of four sequences


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def room_for(monkeypatch, sequences: int, first: int = 0) -> None:
    """As on a device that from block `first` on can run so many sequences at once."""
    run = BlockInputs.run

    def limited(self, index, block, hidden):
        if index >= first and len(hidden) > sequences:
            raise torch.OutOfMemoryError(f"no room for {len(hidden)}")
        return run(self, index, block, hidden)

    monkeypatch.setattr(BlockInputs, "run", limited)


def at_block(monkeypatch, index: int, action) -> None:
    solve = pipeline.solve_block
    monkeypatch.setattr(pipeline, "solve_block", lambda *a: (action() if a[3] == index else None, solve(*a))[1])


def test_batches_become_smaller_until_they_fit_and_stay_so_when_resumed(llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        room_for(patch, 2)
        report = quantize(llama, tmp_path / "whole", CONFIG)
        assert report.recipe["smaller_batches"] == 2
        # two blocks begun: the first one twice
        interrupted(patch, 2, llama, tmp_path / "out", CONFIG)
    quantize(llama, tmp_path / "out", CONFIG, resume=True)  # with room for four again
    assert weights_and_config(tmp_path / "out") == weights_and_config(tmp_path / "whole")
    assert "smaller_batches" not in quantize(llama, tmp_path / "usual", CONFIG).recipe


def test_when_no_batch_fits_the_error_says_what_to_change(llama, tmp_path, monkeypatch):
    room_for(monkeypatch, 0)
    with pytest.raises(FoemError, match="out of device memory .no room for 1.; use fewer --samples, a shorter --seq-len"):
        quantize(llama, tmp_path / "out", CONFIG)
    assert not list(tmp_path.iterdir())


def test_finished_blocks_are_not_thrown_away_for_smaller_batches(llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        room_for(patch, 0, first=1)
        with pytest.raises(FoemError, match="out of device memory .no room for 4.; free some.* go on with: --resume"):
            quantize(llama, tmp_path / "out", CONFIG)
    assert "smaller_batches" not in quantize(llama, tmp_path / "out", CONFIG, resume=True).recipe


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 60)])
def test_host_memory_that_is_not_there_is_known_by_its_errors(ask):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask()
    assert memory.ran_out(caught.value) == "host"


def test_other_errors_are_not_about_memory(tmp_path):
    def fail(smaller):
        raise RuntimeError("shapes differ")

    assert memory.ran_out(RuntimeError("shapes differ")) is None
    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.with_smaller_batches(fail, tmp_path / "absent")


@pytest.mark.parametrize("change, says", [("delete", "deleted while it was read"), ("replace", "changed while it was read")])
def test_a_source_that_changes_during_the_run_is_noticed(llama, tmp_path, monkeypatch, change, says):
    source = shutil.copytree(llama, tmp_path / "source")
    file, aside = source / "model.safetensors", tmp_path / "aside"
    shutil.copy2(file, aside)
    action = file.unlink if change == "delete" else lambda: shutil.copy(aside, file)  # the same bytes, but who knows
    with monkeypatch.context() as patch:
        at_block(patch, 1, action)
        with pytest.raises(FoemError, match=says):
            quantize(source, tmp_path / "out", CONFIG)
    shutil.copy2(aside, file)
    quantize(source, tmp_path / "out", CONFIG, resume=True)
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_between_the_last_renames_of_a_redo(llama, tmp_path, monkeypatch, renames):
    """After the first rename there is no checkpoint under its name, after the second the hidden folder is left over."""
    quantize(llama, tmp_path / "out", CONFIG)
    before = weights_and_config(tmp_path / "out")
    rename, count = type(tmp_path).rename, 0

    def stopping(self, target):
        nonlocal count
        count += 1
        rename(self, target)
        if count == renames:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", stopping)
        patch.setattr("foem_vllm.writer.shutil.rmtree", lambda *a, **k: None)
        with pytest.raises(Stop):
            quantize(llama, tmp_path / "out", CONFIG, redo="down_proj")
    assert (tmp_path / "out").exists() == (renames == 2) and (tmp_path / ".out.partial").exists()
    Writer(tmp_path / "out").tidy()
    assert renames == 2 or weights_and_config(tmp_path / "out") == before
    quantize(llama, tmp_path / "out", CONFIG, resume=True, redo="down_proj")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "words, processes, here, expected",
    [
        (["quantize", "a model", "out"], 1, 1, "foem quantize 'a model' out --resume"),
        (["quantize", "m", "out", "--resume"], 1, 1, "foem quantize m out --resume"),
        (["quantize", "m", "out"], 2, 2, "torchrun --nproc-per-node 2 -m foem_vllm quantize m out --resume"),
        (["quantize", "m", "out"], 16, 8, "--resume"),
        (["compare", "m"], 1, 1, "--resume"),
        ([], 1, 1, "--resume"),
    ],
)
def test_the_command_that_goes_on(monkeypatch, words, processes, here, expected):
    monkeypatch.setattr(command, "words", words)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert command.resume() == expected


@pytest.mark.parametrize(
    "words, code, processes, stdout, at_once",
    [
        (["quantize", "m", "out"], 0, 1, io.StringIO(), True),
        (["quantize", "m", "out"], 143, 1, io.StringIO(), False),
        (["quantize", "m", "out"], 0, 2, io.StringIO(), False),
        (["inspect", "out"], 0, 1, io.StringIO(), False),
        (["quantize", "m", "out"], 0, 1, None, False),
        (["quantize", "m", "out"], 0, 1, "/dev/full", False),
    ],
)
def test_only_what_has_succeeded_ends_at_once(monkeypatch, words, code, processes, stdout, at_once):
    """Else Python ends the process: with its exit code, and a word about what could not be written."""
    left = []
    stdout = open(stdout, "w") if isinstance(stdout, str) else stdout

    def run():
        print("buffered until the end", file=stdout) if stdout else None
        raise SystemExit(code)

    monkeypatch.setattr("sys.argv", ["foem", *words])
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr(cli, "app", run)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.os, "_exit", left.append)
    monkeypatch.setattr(distributed, "size", lambda: processes)
    monkeypatch.setattr(command, "words", [])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code and left == [0] * at_once
