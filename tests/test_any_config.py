"""Whatever a JSON file says, the run is either refused with 2 or trains."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quest_7_2 as quest

# Any JSON value at all, in the place of any option …
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
# … or one that a user might choose, within what this machine can train in a moment.
SENSIBLE = {
    "resolution": st.sampled_from([8, 16, 40, 64, 72]),
    "trainBatchSize": st.integers(1, 5),
    "microBatchSize": st.none() | st.integers(1, 9),
    "gradientAccumulationSteps": st.integers(1, 5),
    "learningRate": st.sampled_from([1e-4, 1e-2, 1]),
    "numTrainEpochs": st.integers(1, 2),
    "trainPrompt": st.text(max_size=300),
    "rank": st.integers(1, 9),
    "loraAlpha": st.floats(0.5, 64),
    "loraDropout": st.floats(0, 0.9),
    "captionDropout": st.floats(0, 0.9),
    "seed": st.integers(0, 2**63 - 1),
    "mixedPrecision": st.sampled_from([None, "no", "bf16", "fp16"]),
    "gradientCheckpointing": st.booleans(),
    "useDora": st.booleans(),
    "fp8Base": st.just(False),
    "useRslora": st.booleans(),
    "initLoraWeights": st.sampled_from([None, "gaussian"]),
    "lrScheduler": st.sampled_from(["constant", "linear", "cosine", "polynomial"]),
    "snrGamma": st.none() | st.floats(1, 10),
    "noiseOffset": st.floats(0, 0.2),
    "resizeMode": st.sampled_from(["squash", "crop"]),
    "maxGradNorm": st.floats(1e-3, 1e3),
    "maxTrainSteps": st.none() | st.integers(1, 3),
    "checkpointingSteps": st.integers(1, 3),
    "resume": st.booleans(),
}
OPTIONS = st.fixed_dictionaries({}, optional=SENSIBLE)
# Anything in the place of these would be taken at its word: another folder, a longer run.
LONG = {"numTrainEpochs", "rank", "resolution", "learningRate", "maxGradNorm"}
WRONG = st.dictionaries(
    st.sampled_from(sorted(SENSIBLE.keys() - LONG)), ANYTHING, min_size=1, max_size=1
)


SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def outcome(config, tmp_path, options) -> int:
    """The exit code of a run with these options in its JSON file."""
    base = config(num_train_epochs=1)
    values = {quest.key_of(o.name): getattr(base, o.name) for o in fields(base)} | options
    file = tmp_path / "input.json"
    file.write_text(json.dumps(values))
    shutil.rmtree(base.output_dir, ignore_errors=True)
    try:
        wanted = quest.read_config(["--config", str(file)])
    except quest.Trouble as trouble:
        assert any(key in str(trouble) for key in options)
        return trouble.exit_code
    code = quest.run(wanted)
    result = json.loads((Path(base.output_dir) / "result.json").read_text())
    assert result["success"] is (code == 0)
    return code


@settings(max_examples=40, **SETTINGS)
@given(options=OPTIONS)
def test_any_sensible_config_trains(options, config, tmp_path):
    assert outcome(config, tmp_path, options) == 0


@settings(max_examples=60, **SETTINGS)
@given(options=OPTIONS, wrong=WRONG)
def test_any_config_is_refused_or_trains(options, wrong, config, tmp_path):
    assert outcome(config, tmp_path, options | wrong) in (0, 2)
