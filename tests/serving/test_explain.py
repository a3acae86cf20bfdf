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


MULTI = "multi_label_classification"


@pytest.mark.parametrize("rule", ["confidence", "patience", "beem", "gate"])
def test_many_labels_are_told_by_their_names(tiny_model, open_policy, tokenizer, random_texts, rule):
    names = {0: "anger", 1: "joy", 2: "a long name of a label", 3: "fear"}
    model = tiny_model(num_labels=4, problem_type=MULTI, id2label=names, exit_gate="linear" if rule == "gate" else None)
    half = ee.policies.GatePolicy.half(4, problem_type=MULTI)
    model.set_exit_policy(half if rule == "gate" else open_policy(model, rule))
    layers, answers = set(), set()
    for text in random_texts(12):
        story, served = ee.explain(model, text, tokenizer=tokenizer), ee.predict(model, [text], tokenizer=tokenizer)
        assert story.exit_layer == int(served.exit_layer[0])
        view = next(view for view in story.exits if view.layer == story.exit_layer)
        given = (served.logits[0] > 0).nonzero()[:, 0].tolist()
        assert view.prediction == (", ".join(names[label] for label in given) or "no label")
        assert view.score == pytest.approx(float(served.exit_score[0]), abs=1e-5)
        assert all(view.prediction in str(story).splitlines()[3 + place] for place, view in enumerate(story.exits))
        layers.add(story.exit_layer)
        answers |= {view.prediction for view in story.exits}
    assert len(answers) > 3
    assert len(layers) > 1 or rule in ("gate", "patience")


@pytest.mark.parametrize("rule", ["patience", "gate", "static"])
@pytest.mark.parametrize("values", [1, 3])
def test_values_are_told_whole(tiny_model, open_policy, tokenizer, random_texts, rule, values):
    fields = {"num_labels": values, "problem_type": "regression", "exit_gate": "linear" if rule == "gate" else None}
    model = tiny_model(**fields)
    half = ee.policies.GatePolicy.half(4, problem_type="regression")
    model.set_exit_policy(half if rule == "gate" else open_policy(model, rule))
    for text in random_texts(5):
        story, served = ee.explain(model, text, tokenizer=tokenizer), ee.predict(model, [text], tokenizer=tokenizer)
        assert story.exit_layer == int(served.exit_layer[0])
        shown = next(view.prediction for view in story.exits if view.layer == story.exit_layer)
        assert [float(part) for part in shown.split(", ")] == pytest.approx(served.logits[0].tolist(), rel=1e-2)
        assert all(view.prediction in str(story) for view in story.exits), "no value is cut short"
        assert "agreed" not in story.reason


def test_rows_in_any_form_are_named(tiny_model, open_policy, tokenizer):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "patience"))
    ids = dict(tokenizer("w5 w6"))
    stories = [ee.explain(model, row, tokenizer=tokenizer) for row in ("w5 w6", ids, ("w5", "w6"))]
    assert [story.text for story in stories] == ["w5 w6", "4 token ids", "w5 | w6"]
    assert stories[0].exits == stories[1].exits
