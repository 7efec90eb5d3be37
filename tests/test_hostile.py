"""Whatever a user, a disk or an attacker hands the readers: a UserError that names it, or a sound result.

Hostile checkpoints are in test_checkpoint.py.
"""

import contextlib
import copy
import html.parser
import itertools
import json

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.loader import Tokens
from model import GPTConfig
from spikesink import schema
from spikesink.errors import UserError
from spikesink.files import rows_of
from spikesink.measure.findings import Findings
from spikesink.show import page
from train import TrainConfig
from trainer import config
from trainer.log import JsonLines

from .test_scripts import detected  # noqa: F401

SCHEMAS = (GPTConfig, TrainConfig)
KEYS = [*config.fields_of(SCHEMAS), "n_layers", "", "__class__", "out-dir", "--"]
many = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
words = (
    st.text(max_size=8) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["True", "none", "0", "-1"])
)


@many
@given(st.lists(st.tuples(st.sampled_from(KEYS), words), max_size=4))
def test_any_command_line_is_a_run_or_one_clear_error(tmp_path, options):
    try:
        values, _ = config.parse_argv(SCHEMAS, [f"--{key}={value}" for key, value in options], tmp_path)
        config.build(SCHEMAS, values)
    except UserError:
        pass


@many
@given(st.dictionaries(st.sampled_from([*KEYS[:-3], "dtype"]), plain, max_size=4))
def test_any_values_of_a_config_file_are_a_run_or_one_clear_error(tmp_path, values):
    path = tmp_path / "any.py"
    source = "".join(f"{key} = {value!r}\n" for key, value in values.items() if key.isidentifier())
    path.write_text(f"nan, inf = float('nan'), float('inf')\n{source}del nan, inf\n")
    with contextlib.suppress(UserError):
        config.build(SCHEMAS, config.parse_argv(SCHEMAS, [str(path)], tmp_path)[0])


@many
@given(
    meta=plain
    | st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["uint8", "uint16", "uint32", "int16", "O", "float32"]) | plain,
            "vocab_size": st.integers(-2, 300) | plain,
            "bos_id": st.integers(-2, 300) | plain,
            "train_tokens": st.integers(-2, 100) | plain,
        },
    ),
    tokens=st.binary(max_size=200),
    bos=st.booleans(),
)
def test_any_dataset_is_read_within_its_vocabulary_or_refused(tmp_path, meta, tokens, bos):
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "train.bin").write_bytes(tokens)
    try:
        data = Tokens(str(tmp_path), "train", 8, bos)
        x, y = data.batch(3, 2)
    except UserError:
        return
    assert x.shape == y.shape == (2, 8)
    assert min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) < data.meta["vocab_size"]


@many
@given(st.lists(st.binary(max_size=30) | plain.map(lambda value: json.dumps({"step": value}).encode()), max_size=6))
def test_any_log_is_gone_on_with(tmp_path, lines):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(lines))
    log = JsonLines(path, step=5)
    log.write({"step": 6})
    log.close()
    assert rows_of(path)[-1] == {"step": 6}
    assert all(row["step"] <= 6 for row in rows_of(path))


class Tags(html.parser.HTMLParser):
    """The tags and attribute names of a page, in order, and all its text."""

    def __init__(self, page):
        super().__init__()
        self.seen, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, *(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text.append(data)


ATTACKS = [
    *("<script>alert(1)</script>", "</td><img src=x onerror=alert(1)>", "'\"><svg/onload=alert(1)>", "{{ 7 * 7 }}"),
    *(
        "</style><script>1</script>",
        "javascript:alert(1)",
        "<!--",
        "]]>",
        "&lt;script&gt;",
        "\x00<b>",
        "$x_{2}$",
        "\\frac",
    ),
]


def test_token_text_never_becomes_part_of_the_page(detected, tmp_path):  # noqa: F811
    """Whatever tokens, paths and names say, the page has the tags and attributes it has without it."""

    def page_of(texts):
        changed = copy.deepcopy(found)
        endless = itertools.cycle(texts)
        for token in (*changed["spikes"]["tokens"], *changed["sinks"]["tokens"]):
            token["text"] = token["before"] = next(endless)
        for sequence in changed["examples"]["sequences"]:
            sequence["texts"] = [next(endless) for _ in sequence["texts"]]
        changed["checkpoint"]["path"] = changed["data"]["name"] = "".join(texts)
        page.detection_page(tmp_path / "page.html", schema.from_json(Findings, changed))
        return (tmp_path / "page.html").read_text()

    found, _ = detected("--n_seq=20")
    harmless, harmful = Tags(page_of(["word"])), Tags(page_of(ATTACKS))
    in_figures = {"g", "path", "use", "defs", "rect", "clippath", "text", "svg", "style", "metadata"}
    outside = lambda page: [tag for tag in page.seen if tag[0] not in in_figures]
    assert outside(harmless) == outside(harmful)
    assert not any(name.startswith("on") for tag in harmful.seen for name in tag[1:])
    assert sum(tag[0] == "script" for tag in harmful.seen) == 3  # ours: the examples, plotly, what uses them


def test_the_arrays_that_are_read_hold_no_objects(tmp_path, cli, trained):
    """--tokens reads .npy, which can hold pickles."""
    np.save(tmp_path / "evil.npy", np.array([object], dtype=object), allow_pickle=True)
    code, _, err = cli("detect.py", trained, f"--tokens={tmp_path / 'evil.npy'}")
    assert code == 2 and "cannot read --tokens" in err
