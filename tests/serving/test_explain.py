"""A row's way through the layers."""

import pytest

import hf_earlyexit as ee


def test_the_story_agrees_with_the_model(tiny_model, open_policy, tokenizer, random_texts):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "patience"))
    for text in random_texts(12):
        told = ee.explain(model, text, tokenizer=tokenizer)
        served = ee.predict(model, [text], tokenizer=tokenizer)
        assert told.exit_layer == int(served.exit_layer[0])
        leaving = next(view for view in told.exits if view.layer == told.exit_layer)
        assert leaving.verdict.startswith("leaves")
        assert leaving.score == pytest.approx(float(served.exit_score[0]), abs=1e-5)
        assert leaving.prediction == model.config.id2label[int(served.logits[0].argmax())]
        assert all("stays" in view.verdict for view in told.exits if view.layer < told.exit_layer)
        assert all(view.verdict == "not reached" for view in told.exits if view.layer > told.exit_layer)
        assert told.reason.split(" of ")[0].endswith(f"layer {told.exit_layer}") or "through all 4 layers" in told.reason
        assert str(told).splitlines()[:2] == [repr(text), told.reason]
        assert len(str(told).splitlines()) == 7


def test_muted_and_closed_exits_are_named(tiny_model, tokenizer):
    model = tiny_model()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[None, None, 0.0], muted=[0]))
    verdicts = [view.verdict for view in ee.explain(model, "w5 w6", tokenizer=tokenizer).exits]
    assert verdicts == ["muted", "closed", "leaves: score reaches the threshold", "not reached"]


def test_a_model_without_policy_says_what_to_do(tiny_model, tokenizer):
    with pytest.raises(ee.EarlyExitError, match="calibrate first"):
        ee.explain(tiny_model(), "w5", tokenizer=tokenizer)
