"""The installed wheel, used by a stranger: run by `bash run.sh wheel` in a fresh environment and an empty folder.

    python tests/wheel.py CLONE

No pytest here: the environment holds spikesink[hf,pages] alone. Prints what it tried; fails on the first surprise.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import spikesink
from spikesink.models.export import byte_tokenizer

LAB = ("model", "train", "detect", "ablate", "study", "data", "trainer", "studies", "benchmarks", "configs")


def run(*command: str, code: int = 0) -> str:
    """What a command printed, stdout and stderr together; it must end with `code`."""
    print("$", *command, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def make_transformers_folder() -> None:
    """A tiny GPT-2 with random weights, and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=257, bos_token_id=256, eos_token_id=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained("tiny")
    byte_tokenizer().save_pretrained("tiny")


def make_nanogpt_checkpoint() -> None:
    """A checkpoint as nanoGPT writes it: names, Linear layers without biases, the prefix of a compiled model."""
    C, V, T = 32, 64, 64
    args = {"n_layer": 1, "n_head": 2, "n_embd": C, "block_size": T, "bias": False, "vocab_size": V, "dropout": 0.0}
    shapes = {"wte": (V, C), "wpe": (T, C), "h.0.ln_1": (C,), "h.0.attn.c_attn": (3 * C, C), "ln_f": (C,)}
    shapes |= {"h.0.attn.c_proj": (C, C), "h.0.ln_2": (C,), "h.0.mlp.c_fc": (4 * C, C), "h.0.mlp.c_proj": (C, 4 * C)}
    state = {f"_orig_mod.transformer.{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    torch.save({"model": state, "model_args": args, "iter_num": 7, "config": {"dataset": "shakespeare"}}, "nano.pt")
    import numpy as np

    np.save("ids.npy", np.random.default_rng(0).integers(V, size=(8, 32)))


def readme_example(clone: Path) -> str:
    """The README's Python on the library, on the local folder instead of the hub's gpt2."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (clone / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    example = next(block for block in blocks if "spikesink.page(" in block)
    return example.replace('"gpt2"', '"tiny"')


def main(clone: Path) -> None:
    assert not list(Path.cwd().iterdir()), "start in an empty folder"
    assert clone not in Path(spikesink.__file__).parents, "this is to try the wheel, not the clone"
    assert [name for name in LAB if importlib.util.find_spec(name)] == []
    assert re.fullmatch(r"spikesink \d+\.\d+\.\d+\n", run("spikesink", "--version"))
    make_transformers_folder()
    text = run("spikesink", "detect", "tiny", "--n_seq", "20")
    found = json.loads(Path("tiny/detect.json").read_text())
    assert (
        found["data"]["name"].startswith("stdlib of Python 3")
        and found["data"]["n_seq"] == 20
        and "top1/median" in text
    )
    assert "<h1>" in Path("tiny/detect.html").read_text()
    run(sys.executable, "-m", "spikesink", "ablate", "tiny", "--n_seq=8", "--only", "sink_mask", "--no-probes")
    assert Path("tiny/report.html").is_file()

    Path("example.py").write_text(readme_example(clone))
    run(sys.executable, "example.py")
    assert Path("gpt2.json").is_file() and Path("gpt2.html").is_file()

    make_nanogpt_checkpoint()
    run("spikesink", "detect", "nano.pt", "--tokens", "ids.npy", "--json", "nano.json", "--html", "nano.html")
    assert json.loads(Path("nano.json").read_text())["checkpoint"]["step"] == 7
    if len(sys.argv) > 2:  # a checkpoint of train.py, where one is at hand
        lab = sys.argv[2]
        assert "--model path/to/model.py" in run("spikesink", "detect", lab, "--json=a.json", code=2)
        text = run("spikesink", "detect", lab, "--model", str(clone / "model.py"), "--json=a.json", "--html=a.html")
        assert f"running {clone / 'model.py'}" in text
    print("the wheel works")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
