"""``jitmoe train``: what it leaves, what it refuses before anything is loaded, and what survives its end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import on_threads, same_bits
from training import ATTENTION, EXPERTS, TEXT, byte_tokenizer, tiny_model

pytest.importorskip("transformers", reason="jitmoe train needs transformers")
pytest.importorskip("peft", reason="jitmoe train needs PEFT")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from safetensors.torch import load_file

from jitmoe.cli import main
from jitmoe.errors import DataError
from jitmoe.hf.train import checkpoints
from jitmoe.hf.train.rows import Row
from jitmoe.hf.train.tokens import IGNORED, encode

Result = tuple[int, str, str]
QUICK = ("--steps", "6", "--save-every", "2", "--rank", "5", "--lr", "0.01", "--batch-size", "3")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with on_threads(1):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("eager").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two forms."""
    text, path = TEXT.decode(), tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows: list[dict[str, str]] = [{"text": text[start : start + 30 + start % 37]} for start in range(0, 2000, 90)]
    rows += [{"prompt": text[at : at + 20], "completion": text[at + 20 : at + 45]} for at in range(0, 700, 90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command in this process; gives (exit status, stdout, stderr)."""

    def call(*arguments: object) -> Result:
        status = main(["train", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def uninterrupted(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert main(["train", str(model), str(data), "--output", str(output), *QUICK]) == 0
    return output


def losses(output: Path) -> list[float]:
    return [loss for _, loss in checkpoints.losses_in(checkpoints.find(output).complete[-1])]


def same_run(one: Path, other: Path) -> bool:
    tensors = [load_file(output / "adapter" / "adapter_model.safetensors") for output in (one, other)]
    same = tensors[0].keys() == tensors[1].keys()
    same = same and all(same_bits(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    return same and len(losses(one)) == 6 and losses(one) == losses(other)


def start(*arguments: object, before: str = "") -> "subprocess.Popen[str]":
    """The command in a process of its own, on one thread, after the statements ``before``."""
    program = f"import sys, torch; torch.set_num_threads(1)\n{before}\nfrom jitmoe.cli import main; sys.exit(main())"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestARun:
    def test_what_it_says(self, run: Callable[..., Result], model: Path, data: Path, tmp_path: Path) -> None:
        status, out, err = run(model, data, "--output", tmp_path / "out", *QUICK, "--steps", "20")
        assert status == 0, err
        assert "2 layers with experts" in out and "rank 5" in out and "20 steps of 3 rows" in out
        assert "activations outside of the experts" in out and "free memory of this machine" in out
        assert "2 experts modules: jitmoe, 7 experts 40x24, silu" in out and "NOT on jitmoe" not in out
        lines = [line for line in err.splitlines() if line.startswith("jitmoe: training step")]
        assert len(lines) == 10 and "tokens/s" in lines[0] and "left" in lines[0]
        assert "loaded as bfloat16" not in out
        found = losses(tmp_path / "out")
        assert sum(found[-5:]) < sum(found[:5]) - 1

    def test_what_it_leaves(self, uninterrupted: Path) -> None:
        assert {path.name for path in uninterrupted.iterdir()} == {
            "adapter", "checkpoint-4", "checkpoint-6", "loss.png", "run.json",
        }  # fmt: skip
        assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_the_adapter_loads_in_stock_peft(self, uninterrupted: Path, model: Path) -> None:
        from peft import PeftModel
        from peft.utils import get_peft_model_state_dict
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, experts_implementation="eager")
        loaded = PeftModel.from_pretrained(base, uninterrupted / "adapter")
        saved = load_file(uninterrupted / "adapter" / "adapter_model.safetensors")
        found = get_peft_model_state_dict(loaded)
        assert saved.keys() == found.keys() and all(same_bits(saved[name], found[name]) for name in saved)
        assert all(tensor.any() for tensor in saved.values())
        assert len(saved) == 2 * 2 * (len(ATTENTION) + len(EXPERTS))

    def test_a_float32_checkpoint_is_loaded_as_bfloat16(
        self, run: Callable[..., Result], model: Path, data: Path, uninterrupted: Path, tmp_path: Path
    ) -> None:
        wide = tmp_path / "wide"
        tiny_model("eager", torch.float32).save_pretrained(wide)
        byte_tokenizer().save_pretrained(wide)
        status, out, err = run(wide, data, "--output", tmp_path / "out", *QUICK)
        assert status == 0, err
        assert "weights in F32: all are loaded as bfloat16" in out
        assert same_run(uninterrupted, tmp_path / "out")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


class TestRefusals:
    """Each before a weight is loaded or a folder made."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (shutil.rmtree, "is not a folder: give a local checkpoint"),
            (without("config.json"), "has no config.json"),
            (without("model.safetensors"), "lacks 1 of 1 files of weights: model.safetensors"),
            (truncated, "model.safetensors is damaged"),
            (no_tokenizer, "has no tokenizer"),
            (with_config(quantization_config={"quant_method": "awq"}), "quant_method 'awq' is none that jitmoe knows"),
            (with_config(model_type="qwen3"), "Qwen3ForCausalLM has no experts"),
            (with_config(hidden_act="gelu"), "Qwen3MoeExperts cannot run on jitmoe: its activation (GELU"),
            (with_config(vocab_size=100), "and the model knows 100 tokens"),
            (with_config(model_type="nonsense"), "transformers makes no language model"),
        ],
    )
    def test_a_folder(
        self, run: Callable[..., Result], model: Path, data: Path, tmp_path: Path,
        change: Callable[[Path], None], message: str,
    ) -> None:  # fmt: skip
        folder = tmp_path / "model"
        shutil.copytree(model, folder)
        change(folder)
        status, _, err = run(folder, data, "--output", tmp_path / "out", *QUICK)
        assert status == 1 and message in err and "Traceback" not in err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON"),
            ("", "not JSON"),
            ("[1]", "found list"),
            ('{"text": "a", "prompt": "b"}', "found text, prompt"),
            ('{"prompt": "b"}', "found prompt"),
            ('{"text": 3}', "text must be a string"),
            ('{"text": ""}', "text is empty"),
            ('{"messages": []}', "messages must be a list"),
            ('{"messages": [{"content": "a"}]}', "messages must be a list"),
            ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
            ('{"prompt": "0123456789012345678901234567890123456789", "completion": "b"}', "nothing to learn"),
        ],
    )
    def test_a_row(self, run: Callable[..., Result], model: Path, tmp_path: Path, line: str, message: str) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(f'{{"text": "good"}}\n{line}\n{{"text": "good"}}\n')
        status, _, err = run(model, rows, "--output", tmp_path / "out", "--max-length", "30")
        assert status == 1 and f"{rows}:2: " in err and message in err
        assert not (tmp_path / "out").exists()

    def test_no_file_and_no_rows(self, run: Callable[..., Result], model: Path, tmp_path: Path) -> None:
        assert "cannot be read" in run(model, tmp_path / "none.jsonl")[2]
        (tmp_path / "empty.jsonl").touch()
        assert "has no rows" in run(model, tmp_path / "empty.jsonl")[2]

    def test_too_little_memory(self, run: Callable[..., Result], model: Path, data: Path, tmp_path: Path) -> None:
        status, out, err = run(model, data, "--output", tmp_path / "out", "--memory-budget", "200000000")
        assert status == 1 and "training would hold" in err and "--memory-budget is 200 MB" in err
        assert "in all" in out and not (tmp_path / "out").exists()

    def test_an_output_that_is_not_empty(
        self, run: Callable[..., Result], model: Path, data: Path, uninterrupted: Path, tmp_path: Path
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
        assert "is not empty" in run(model, data, "--output", uninterrupted, *QUICK)[2]
        status, _, err = run(model, data, "--output", uninterrupted, *QUICK, "--rank", "6", "--resume")
        assert status == 1 and "another run (rank 5, now 6)" in err
        assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
        (tmp_path / "mine.txt").touch()
        status, _, err = run(model, data, "--output", tmp_path, *QUICK, "--resume")
        assert status == 1 and "holds no run of jitmoe train" in err

    @pytest.mark.parametrize("option", ["--rank", "--steps", "--batch-size", "--epochs", "--lr"])
    def test_a_number_out_of_range(self, run: Callable[..., Result], model: Path, data: Path, option: str) -> None:
        status, _, err = run(model, data, option, "0")
        assert status == 1 and f"{option[2:].replace('-', '_')} must be" in err

    def test_a_loss_that_is_not_finite_ends_the_run(
        self, run: Callable[..., Result], model: Path, data: Path, tmp_path: Path
    ) -> None:
        status, _, err = run(model, data, "--output", tmp_path / "out", *QUICK, "--lr", "1e38")
        assert status == 1 and "take a smaller --lr" in err
        assert not (tmp_path / "out" / "adapter").exists()


KILLED = """
import os, signal
def hook(event, details):
    if event == "open" and str(details[0]).endswith("checkpoint-4/{name}"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


KILLED_BEFORE_A_KERNEL = """
import os, signal
from contextlib import contextmanager
from jitmoe.experts import observer
class Kills(observer.Observer):
    left = {call}
    @contextmanager
    def around(self, launch):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        yield
observer._Seam.inside.append(Kills())
"""


class TestCheckpoints:
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("adapter_config.json", marks=pytest.mark.slow),
            "trainer_state.json",
            pytest.param(".complete.json.part", marks=pytest.mark.slow),
        ],
    )
    def test_killed_in_the_middle_of_saving(
        self, run: Callable[..., Result], model: Path, data: Path, uninterrupted: Path, tmp_path: Path, name: str
    ) -> None:
        output = tmp_path / "out"
        with start(model, data, "--output", output, *QUICK, before=KILLED.format(name=name)) as killed:
            _, err = killed.communicate(timeout=120)
        assert killed.returncode == -signal.SIGKILL, err
        found = checkpoints.find(output)
        assert [path.name for path in found.complete] == ["checkpoint-2"]
        assert [path.name for path in found.incomplete] == ["checkpoint-4"]
        status, out, err = run(model, data, "--output", output, *QUICK, "--resume")
        assert status == 0, err
        assert "checkpoint-4 is incomplete, and is removed" in out and "resumes from checkpoint-2" in out
        assert same_run(uninterrupted, output)

    @pytest.mark.slow
    @pytest.mark.parametrize("call", [1, 7, 11, 18, 23])
    def test_killed_in_the_middle_of_a_step(
        self, run: Callable[..., Result], model: Path, data: Path, uninterrupted: Path, tmp_path: Path, call: int
    ) -> None:
        """SIGKILL before a kernel of the experts runs, in forward or backward of any step."""
        output = tmp_path / "out"
        with start(model, data, "--output", output, *QUICK, before=KILLED_BEFORE_A_KERNEL.format(call=call)) as killed:
            _, err = killed.communicate(timeout=240)
        assert killed.returncode == -signal.SIGKILL, err
        assert not checkpoints.find(output).incomplete
        status, out, err = run(model, data, "--output", output, *QUICK, "--resume")
        assert status == 0, err
        assert "resumes from checkpoint" in out or "begins at step 0" in out
        assert same_run(uninterrupted, output)

    def test_interrupted(self, run: Callable[..., Result], model: Path, data: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        with start(model, data, "--output", output, *QUICK, "--steps", "100000") as training:
            end = time.monotonic() + 120
            while not (output.is_dir() and checkpoints.find(output).complete) and time.monotonic() < end:
                time.sleep(0.05)
            training.send_signal(signal.SIGINT)
            _, err = training.communicate(timeout=60)
        assert training.returncode == 130, err
        found = checkpoints.find(output)
        assert found.complete and not found.incomplete
        assert f"{found.complete[-1].name} is complete: go on with --resume" in err and "Traceback" not in err

    def test_a_file_that_has_lost_its_end_does_not_count(self, uninterrupted: Path, tmp_path: Path) -> None:
        shutil.copytree(uninterrupted, tmp_path / "out")
        newest = checkpoints.find(tmp_path / "out").complete[-1]
        os.truncate(newest / "optimizer.pt", 10)
        assert checkpoints.find(tmp_path / "out").incomplete == (newest,)

    def test_resumed_after_its_end(
        self, run: Callable[..., Result], model: Path, data: Path, uninterrupted: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        shutil.copytree(uninterrupted, output)
        status, out, err = run(model, data, "--output", output, *QUICK, "--resume")
        assert status == 0 and "resumes from checkpoint-6" in out, err
        assert same_run(uninterrupted, output)

    def test_resumed_before_its_first_checkpoint(
        self, run: Callable[..., Result], model: Path, data: Path, uninterrupted: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        output.mkdir()
        shutil.copy(uninterrupted / "run.json", output)
        status, out, err = run(model, data, "--output", output, *QUICK, "--resume")
        assert status == 0 and "begins at step 0" in out, err
        assert same_run(uninterrupted, output)


class TestTokens:
    def test_only_the_completion_is_learnt(self) -> None:
        tokenizer = byte_tokenizer()
        (row,) = encode([Row("a:1", {"prompt": "ab", "completion": "cd"})], tokenizer, 10).rows
        assert tokenizer.decode(row["input_ids"]) == "abcd</s>"
        assert row["labels"] == [IGNORED, IGNORED, *row["input_ids"][2:]]

    def test_text_is_cut_and_counted(self) -> None:
        found = encode([Row("a:1", {"text": "abcdef"}), Row("a:2", {"text": "ab"})], byte_tokenizer(), 5)
        assert found.cut == 1 and found.longest == 5 and found.tokens == 8
        assert byte_tokenizer().decode(found.rows[0]["labels"]) == "abcde"

    def test_a_conversation_goes_through_the_template_once(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}\n{% endfor %}"
        messages = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]
        (row,) = encode([Row("a:1", {"messages": messages})], tokenizer, 50).rows
        assert tokenizer.decode(row["input_ids"]) == "user:hi</s>\nbot:ho</s>\n", "no second end"
        assert row["labels"] == row["input_ids"]

    def test_a_template_that_refuses_is_an_error_with_its_line(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"a:7: .*roles must alternate"):
            encode([Row("a:7", {"messages": [{"role": "user", "content": "hi"}]})], tokenizer, 50)
