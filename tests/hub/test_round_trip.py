"""A model goes to the Hub in one commit and comes back the same by every road."""

import json
import os
import re
import socket
from hashlib import sha256

import pytest

PUSH = """
model, tokenizer, results = make_all()
everything = dict(tokenizer=tokenizer, calibration=results)
info = ee.push_to_hub(model, "tester/sst2", **everything, commit_message="all of it")
out["pushed"] = info.oid
out["secret"] = ee.push_to_hub(model, "tester/secret", tokenizer=tokenizer, private=True, card=False).oid
faster = make_model()
faster.set_exit_policy(calibrate(faster, [1.5])[0])
out["branch"] = ee.push_to_hub(faster, "tester/sst2", tokenizer=tokenizer, revision="faster").oid
proposal = ee.push_to_hub(faster, "tester/sst2", create_pr=True)
out["proposal"] = [proposal.pr_url, proposal.pr_revision]
try:
    ee.push_to_hub(faster, "tester/sst2", create_pr=True, revision="faster")
except ee.EarlyExitError as error:
    out["both"] = str(error)
model.save_pretrained("shards", max_shard_size="40KB", push_to_hub=True, repo_id="tester/shards")
out["shards"] = ee.push_to_hub(model, "tester/shards").oid
out["answers"] = {str(point): told(model, point=point) for point in (None, "fast", "balanced", "exact")}
out["faster"] = told(faster)
out["thresholds"] = [results[name].policy.thresholds for name in ("fast", "balanced")]
out["kept"] = [path.name for path in Path(os.environ["TMPDIR"]).iterdir() if path.name.startswith("hf_earlyexit-")]
"""

PULL = """
from hf_earlyexit.cli.main import main
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers import BertForSequenceClassification, pipeline
name = "tester/sst2"
def described(model):
    points = [model.policy_at(point).thresholds for point in ("fast", "balanced")]
    assert model.exit_policy == model.policy_at("balanced")
    return [type(model).__name__, {str(p): told(model, point=p) for p in (None, "fast", "balanced", "exact")}, points]
out["auto"] = [described(auto.from_pretrained(name)) for auto in (AutoModel, AutoModelForSequenceClassification)]
out["bfloat16"] = described(AutoModel.from_pretrained(name, dtype="bfloat16"))[2]
out["faster"] = told(AutoModel.from_pretrained(name, revision="faster"))
out["proposed"] = told(AutoModel.from_pretrained(name, revision="refs/pr/1"))
out["secret"] = told(AutoModel.from_pretrained("tester/secret"))
out["one file"] = told(AutoModel.from_pretrained("tester/shards"))
stock = pipeline(model=name)  # the card tells the task
out["stock"] = [int(one["label"][-1]) for one in stock(texts())]
ours = ee.pipeline(model=name, operating_point="fast")
def pairs(answers):
    return [[int(one["label"][-1]), one["exit_layer"]] for one in answers]
out["ours"] = pairs(ours(texts()))
out["called"] = pairs(ours(texts(), operating_point="balanced", batch_size=8))
plain = BertForSequenceClassification.from_pretrained(name, num_labels=3).eval()
tokenizer = AutoTokenizer.from_pretrained(name)
with torch.inference_mode():
    out["plain"] = [int(plain(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts()]
Path("texts.txt").write_text("\\n".join(texts()) + "\\n")
assert main(["predict", name, "--input", "texts.txt", "--output", "answers.jsonl", "--operating_point", "fast"]) == 0
answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
out["cli"] = pairs(answers)
"""


@pytest.fixture(scope="module")
def pushed(hub, run_child, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"], before = str(folder / "tmp"), os.environ.get("TMPDIR")
    try:
        return run_child(hub, folder, PUSH)
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)


def assert_no_trace(commits, hub, folder):
    """No commit holds the token, the host's name, the user's home, or the folder that was worked in."""
    words = [hub.token, socket.gethostname(), os.path.expanduser("~") + "/", str(folder)]
    for commit in commits:
        for name, data in commit.files.items():
            if name.endswith(".safetensors"):  # the header; among the numbers a short host name turns up by chance
                data = data[: 8 + int.from_bytes(data[:8], "little")]
            assert not [word for word in words if word.encode() in data], name


def rows(answers):
    return [list(pair) for pair in zip(*answers, strict=True)]


def test_everything_arrives_in_one_commit(hub, pushed):
    repo = hub.repos["tester/sst2"]
    first, commit = repo.commits[:2]
    assert (first.message, commit.message, commit.sha) == ("initial commit", "all of it", pushed["pushed"])
    wanted = {"config.json", "model.safetensors", "modeling_hf_earlyexit.py", "calibration.json", "README.md"}
    assert wanted | {"tokenizer.json", "tokenizer_config.json"} <= set(commit.files)
    assert pushed["kept"] == []
    assert commit.files["modeling_hf_earlyexit.py"].splitlines() == [
        b"from hf_earlyexit import EarlyExitBertConfig, EarlyExitBertForSequenceClassification"
    ]


def test_no_commit_holds_a_config_without_its_heads(hub, pushed):
    commits = [commit for repo in hub.repos.values() for commit in repo.commits if "config.json" in commit.files]
    assert len(commits) >= 5
    for commit in commits:
        weights = b"".join(data for name, data in commit.files.items() if name.endswith(".safetensors"))
        assert all(b"exit_heads.%d." % layer in weights for layer in (1, 2, 3))


def test_private_branch_and_pull_request(hub, pushed):
    assert hub.repos["tester/secret"].private
    assert not hub.repos["tester/sst2"].private
    assert "README.md" not in hub.repos["tester/secret"].files()
    repo = hub.repos["tester/sst2"]
    assert repo.branches["faster"] == pushed["branch"]
    assert repo.branches["main"] == pushed["pushed"]
    assert pushed["proposal"] == [f"{hub.url}/tester/sst2/discussions/1", "refs/pr/1"]
    assert "leave out revision" in pushed["both"]


def test_weights_and_calibrations_that_are_outdated_leave_with_the_same_commit(hub, pushed):
    before, after = hub.repos["tester/shards"].commits[-2:]
    assert "model.safetensors.index.json" in before.files
    assert len([name for name in before.files if name.startswith("model-0000")]) >= 3
    assert after.sha == pushed["shards"]
    left = {name for name in after.files if name.startswith("model")}
    assert left == {"model.safetensors", "modeling_hf_earlyexit.py"}
    assert "calibration.json" in hub.repos["tester/sst2"].files()
    assert "calibration.json" not in hub.repos["tester/sst2"].files("refs/pr/1")


def test_the_auto_classes_give_the_same_answers_and_thresholds(pushed, pulled):
    for name, answers, thresholds in pulled["auto"]:
        assert name == "EarlyExitBertForSequenceClassification"
        assert answers == pushed["answers"]
        assert thresholds == pushed["thresholds"]
    assert pulled["bfloat16"] == pushed["thresholds"]
    assert len(set(pushed["answers"]["None"][1])) >= 3
    assert pushed["answers"]["None"] == pushed["answers"]["balanced"] != pushed["answers"]["fast"]
    assert set(pushed["answers"]["exact"][1]) == {4}


def test_a_narrower_dtype_is_told(pulled):
    assert "was calibrated in float32, but the model is loaded in bfloat16" in pulled["stderr"]


def test_revision_pull_request_and_private_repository_load(pushed, pulled):
    assert pulled["faster"] == pulled["proposed"] == pushed["faster"]
    assert pulled["secret"] == pulled["one file"] == pushed["answers"]["balanced"]


def test_pipelines_and_command_line_give_the_same_answers(pushed, pulled):
    answers = pushed["answers"]
    assert pulled["stock"] == answers["balanced"][0]
    assert pulled["ours"] == pulled["cli"] == rows(answers["fast"])
    assert pulled["called"] == rows(answers["balanced"])
    assert pulled["plain"] == answers["exact"][0]


def test_nothing_pushed_tells_where_or_by_whom_it_was_made(hub, pushed, tmp_path_factory):
    for repo in hub.repos.values():
        assert_no_trace(repo.commits, hub, tmp_path_factory.getbasetemp())


def test_a_stranger_sees_no_private_model_and_may_propose(hub, pushed, run_child, tmp_path):
    code = """
    from transformers import AutoModel
    try:
        AutoModel.from_pretrained("tester/secret")
    except OSError as error:
        out["error"] = type(error).__name__
    out["proposal"] = ee.push_to_hub(make_model(), "tester/sst2", create_pr=True).pr_revision
    try:
        ee.push_to_hub(make_model(), "tester/sst2")
    except ee.EarlyExitError as error:
        out["refused"] = str(error)
    """
    found = run_child(hub, tmp_path, code, token=hub.stranger_token)
    assert found["error"]
    assert found["proposal"] == "refs/pr/2"
    assert "could not be pushed to tester/sst2" in found["refused"]


def test_an_upload_that_dies_half_way_leaves_a_folder_and_a_retry_works(hub, run_child, tmp_path):
    hub.add_repo("tester/half")
    hub.fail("500", match="POST .*/tester/half/commit/")
    code = """
    from hf_earlyexit.cli.main import main
    model, tokenizer, results = make_all()
    everything = dict(tokenizer=tokenizer, calibration=results)
    try:
        ee.push_to_hub(model, "tester/half", **everything)
    except ee.EarlyExitError as error:
        out["error"], out["folder"] = str(error), error.path
    kept = ee.EarlyExitBertForSequenceClassification.from_pretrained(out["folder"])
    out["same"] = told(kept) == told(model)
    assert main(["push", out["folder"], "--repo_id", "tester/half", "--commit_message", "again"]) == 0
    """
    found = run_child(hub, tmp_path, code)
    assert f"hf upload tester/half {found['folder']} ." in found["error"]
    assert found["same"]
    repo = hub.repos["tester/half"]
    assert [commit.message for commit in repo.commits] == ["initial commit", "again"]
    assert {"model.safetensors", "config.json", "calibration.json", "tokenizer.json"} <= set(repo.files())
    assert hub.url in found["stdout"]
    assert json.loads(repo.files()["calibration.json"])["results"].keys() == {"fast", "balanced"}


def test_a_pushed_card_tells_measured_time_and_is_valid(hub, run_child, tmp_path):
    code = """
    from hf_earlyexit.cli.main import main
    from huggingface_hub import ModelCard
    model, tokenizer, results = make_all()
    hostile = ["a|b", "---\\n# x", "<script>alert(1)</script>"]
    model.config.id2label = dict(enumerate(hostile))
    model.config.label2id = {name: number for number, name in enumerate(hostile)}
    ee.save(model, "model", tokenizer=tokenizer, calibration=results)
    rows = [f"{text},{number % 3}" for number, text in enumerate(texts(50))]
    Path("data").mkdir()
    Path("data/test.csv").write_text("\\n".join(["text,label", *rows]))
    words = ["push", "model", "--repo_id", "tester/measured", "--test_rows", "data", "--repeats", "3", "--license", "mit"]
    assert main([*words, "--evaluated_on", "me/reviews", "--json"]) == 0
    card = ModelCard.load("tester/measured")
    card.validate()
    out["metadata"], out["text"] = card.data.to_dict(), card.text
    """
    found = run_child(hub, tmp_path, code)
    pushed = json.loads(found["stdout"])
    repo = hub.repos["tester/measured"]
    assert (pushed["repo_id"], pushed["commit"]) == ("tester/measured", repo.branches["main"])
    assert len(repo.commits) == 2
    assert found["metadata"]["license"] == "mit"
    points = re.findall(
        r"^[|] (fast|balanced) [|] confidence [|] 50, chose nothing [|].*x [(].* to .*[)] [|]$", found["text"], re.M
    )
    assert points == ["fast", "balanced"]
    assert "50 texts, cpu, 1 threads, float32" in found["text"]
    assert "<script" not in found["text"]
    assert {".eval_results/fast.yaml", ".eval_results/balanced.yaml"} <= set(repo.files())
    assert_no_trace(repo.commits, hub, tmp_path)


def test_trainer_pushes_every_save(hub, run_child, tmp_path):
    """Our Trainer waits for the push before, so each save has a commit of its own, whose files are those of that save."""
    hub.fail("slow", match="POST .*/tester/trained/preupload/", seconds=2)
    hub.add_repo("tester/failing")
    hub.fail("500", match="POST .*/tester/failing/commit/")
    code = """
    from hashlib import sha256
    tokenizer = make_tokenizer()
    rows = [{**tokenizer(text), "labels": number % 3} for number, text in enumerate(texts())]
    def train(name):
        arguments = ee.EarlyExitTrainingArguments(
            name, max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
            push_to_hub=True, hub_strategy="every_save", hub_model_id="tester/" + name, hub_always_push=True,
            hub_token=os.environ["HF_TOKEN"],
        )
        trainer = ee.EarlyExitTrainer(make_model(), arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return trainer
    train("failing")
    trainer = train("trained")
    saved = [Path("trained", f"checkpoint-{step}", "model.safetensors").read_bytes() for step in (2, 4)]
    out["saved"] = [sha256(data).hexdigest() for data in saved]
    trainer.push_to_hub(commit_message="done")
    out["files"] = sorted(path.name for path in Path("trained").iterdir())
    out["checkpoint"] = sorted(path.name for path in Path("trained/checkpoint-4").iterdir())
    out["here"] = sorted(path.name for path in Path().iterdir())
    from transformers import AutoModel
    out["same"] = told(AutoModel.from_pretrained("tester/trained")) == told(trainer.model)
    """
    found = run_child(hub, tmp_path, code)
    commits = hub.repos["tester/trained"].commits[1:]
    steps = [commit.message for commit in commits]
    assert steps == ["Training in progress, step 2", "Training in progress, step 4", "done"]
    pushed = [sha256(commit.files["model.safetensors"]).hexdigest() for commit in commits]
    assert pushed == [*found["saved"], found["saved"][-1]]
    assert [commit.message for commit in hub.repos["tester/failing"].commits[1:]] == ["Training in progress, step 4"]
    assert "A push to tester/failing failed" in found["stderr"]
    for commit in commits:
        assert {"config.json", "model.safetensors", "modeling_hf_earlyexit.py"} <= set(commit.files)
    assert {"optimizer.pt", "trainer_state.json", "model.safetensors", "config.json"} <= set(found["checkpoint"])
    pushed = [name for commit in commits for name in commit.files]
    assert not [name for name in (*found["files"], *found["checkpoint"], *pushed) if name.endswith(".bin")]
    assert_no_trace(commits, hub, tmp_path)
    assert not [name for name in (*found["files"], *found["here"]) if "saving" in name]
    assert found["same"]
