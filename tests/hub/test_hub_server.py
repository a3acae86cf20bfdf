"""The loopback Hub, as the real client sees it: each test runs a client in a child process and looks at both ends."""

import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from tests.processes import python

Client = Callable[..., dict[str, Any]]
PRELUDE = """
import json, os, sys, time, warnings
from pathlib import Path
from huggingface_hub import *
from huggingface_hub.errors import *
from huggingface_hub.utils import get_session, build_hf_headers
api, out = HfApi(), {}
def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as found:
        status = getattr(getattr(found, "response", None), "status_code", None)
        return [type(found).__name__, status, str(found)]
    return None
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(lfs_threshold=100_000) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Run lines of code with the real client; they fill `out`, which comes back."""

    def run(code: str, home: str = "home", token: str | None = None, **extra: str) -> dict[str, Any]:
        return run_child(hub, tmp_path, code, home, token, **extra)

    return run


def run_child(
    hub: HubServer, folder: Path, code: str, home: str = "home", token: str | None = None, **extra: str
) -> dict[str, Any]:
    """Run `code` after the prelude in a child process which works in `folder` and caches in `home` below it."""
    script = f"{PRELUDE}\n{textwrap.dedent(code)}\nPath('out.json').write_text(json.dumps(out))"
    environment = hub.environment(folder / home, token) | extra
    (folder / "out.json").unlink(missing_ok=True)
    child = python(script, cwd=folder, environment=environment)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads((folder / "out.json").read_text()) | {"stderr": child.stderr}


MODEL = """
    import torch
    from transformers import (
        AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizerFast,
        Trainer, TrainerCallback, TrainingArguments, pipeline,
    )
    Path("vocab.txt").write_text("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]))
    tokenizer = BertTokenizerFast("vocab.txt")
    config = BertConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
"""


def test_models_travel_through_the_hub(hub: HubServer, client: Client) -> None:
    found = client(
        MODEL
        + """
    model.push_to_hub("tester/bert", commit_message="the weights")
    tokenizer.push_to_hub("tester/bert")
    inputs = AutoTokenizer.from_pretrained("tester/bert")("good film", return_tensors="pt")
    loaded = AutoModelForSequenceClassification.from_pretrained("tester/bert").eval()
    out["equal"] = torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    out["ids"] = inputs["input_ids"].tolist()

    out["no task"] = error(pipeline, model="tester/bert")
    head = "library_name: transformers\\npipeline_tag: text-classification"
    ModelCard(f"---\\n{head}\\n---\\n# A card").push_to_hub("tester/bert")
    out["labels"] = [one["label"] for one in pipeline(model="tester/bert")(["good film", "bad film"])]

    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    model.push_to_hub("tester/bert", revision="shifted")
    shifted = AutoModelForSequenceClassification.from_pretrained("tester/bert", revision="shifted")
    out["shift"] = (shifted.classifier.bias - loaded.classifier.bias).tolist()

    rows = [dict(tokenizer("good film"), labels=1), dict(tokenizer("bad film"), labels=0)] * 2
    arguments = TrainingArguments(
        "trained", max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        push_to_hub=True, hub_strategy="every_save", hub_model_id="tester/trained", hub_always_push=True,
        use_cpu=True,
    )
    class OneAtATime(TrainerCallback):  # Trainer writes what it saves into the folder that an upload may still be reading
        def on_step_begin(self, *args, **kwargs):
            if trainer.push_in_progress is not None:
                trainer.push_in_progress.wait_until_done()

    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[OneAtATime()])
    trainer.train()
    trainer.push_to_hub(commit_message="done")
    again = AutoModelForSequenceClassification.from_pretrained("tester/trained")
    out["trained"] = torch.equal(again.classifier.weight, trainer.model.classifier.weight)
    out["card"] = ModelCard.load("tester/trained").data.to_dict()
    """
    )
    repo = hub.repos["tester/bert"]
    assert found["equal"]
    assert found["ids"] == [[2, 5, 7, 3]]
    assert "pipeline_tag" in found["no task"][2]
    assert found["labels"][0].startswith("LABEL_")
    assert found["shift"] == pytest.approx([1.0, 1.0])
    assert [commit.message for commit in repo.commits][:2] == ["initial commit", "the weights"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(repo.files())
    assert set(repo.branches) == {"main", "shifted"}
    assert repo.files("main")["model.safetensors"] != repo.files("shifted")["model.safetensors"]

    trained = hub.repos["tester/trained"]
    assert found["trained"]
    assert found["card"]["library_name"] == "transformers"
    steps = [commit.message for commit in trained.commits[1:]]
    assert steps == ["Training in progress, step 1", "Training in progress, step 2", "done"]


def test_data_sets_travel_through_the_hub(hub: HubServer, client: Client) -> None:
    found = client(
        """
    from datasets import Dataset, load_dataset
    Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}).push_to_hub("tester/films")
    out["rows"] = load_dataset("tester/films", split="train").to_list()
    parquet = "data/train-00000-of-00001.parquet"
    copy = CommitOperationCopy(parquet, "copy.parquet")
    api.create_commit("tester/films", [copy], commit_message="copy", repo_type="dataset")
    """
    )
    repo = hub.repos["datasets/tester/films"]
    assert found["rows"] == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    assert repo.files()["copy.parquet"] == repo.files()["data/train-00000-of-00001.parquet"]
    assert hub.count("^PUT /lfs/") == 1


def test_a_folder_is_one_commit_and_unchanged_files_stay_home(hub: HubServer, client: Client) -> None:
    found = client(
        """
    folder = Path("folder/deep")
    folder.mkdir(parents=True)
    (folder / "small.txt").write_text("small")
    (folder / "large.txt").write_bytes(b"x" * 200_000)
    (folder / "weights.safetensors").write_bytes(b"w" * 10)
    create_repo("tester/files")
    first = upload_folder(repo_id="tester/files", folder_path="folder")
    second = upload_folder(repo_id="tester/files", folder_path="folder")
    (folder / "small.txt").write_text("changed")
    third = upload_folder(repo_id="tester/files", folder_path="folder")
    upload_file(path_or_fileobj=b"x" * 200_000, path_in_repo="copy.txt", repo_id="tester/files")
    out["oids"] = [first.oid, second.oid, third.oid]
    here = Path(snapshot_download("tester/files"))
    out["snapshot"] = {str(p.relative_to(here)): len(p.read_bytes()) for p in here.rglob("*") if p.is_file()}
    """
    )
    repo = hub.repos["tester/files"]
    assert [commit.sha for commit in repo.commits[1:3]] == [found["oids"][0], found["oids"][2]]
    assert found["oids"][1] == found["oids"][0]
    assert set(repo.commits[1].files) - {".gitattributes"} == {
        "deep/small.txt",
        "deep/large.txt",
        "deep/weights.safetensors",
    }
    assert set(repo.commits[1].lfs) == {"deep/large.txt", "deep/weights.safetensors"}
    digest = hashlib.sha256(b"x" * 200_000).hexdigest()
    assert repo.commits[1].lfs["deep/large.txt"].sha256 == digest
    assert hub.count("^PUT /lfs/") == 2, "the copy was here already"
    assert hub.count("^POST /lfs-verify") == 2
    assert repo.files()["deep/small.txt"] == b"changed"
    assert found["snapshot"].items() >= {"deep/small.txt": 7, "deep/large.txt": 200_000, "copy.txt": 200_000}.items()


def test_large_files_must_have_the_announced_sha256(hub: HubServer, client: Client) -> None:
    found = client(
        """
    create_repo("tester/lfs")
    url = os.environ["HF_ENDPOINT"]
    out["put"] = get_session().put(f"{url}/lfs/{'0' * 64}", content=b"other").status_code
    line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 5}}
    body = "\\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "lie"}}, line]))
    answer = get_session().post(f"{url}/api/models/tester/lfs/commit/main", content=body, headers=build_hf_headers())
    out["commit"] = answer.status_code
    """
    )
    assert found["put"] == 400
    assert found["commit"] == 400
    assert hub.lfs_objects == {}
    assert len(hub.repos["tester/lfs"].commits) == 1


def test_branches_tags_pull_requests_and_history(hub: HubServer, client: Client) -> None:
    found = client(
        """
    def push(text, **kwargs):
        return api.upload_file(
            path_or_fileobj=text.encode(), path_in_repo="a/b.txt", repo_id="tester/refs", commit_message=text, **kwargs
        )
    out["url"] = str(create_repo("tester/refs"))
    out["again"] = error(create_repo, "tester/refs")
    create_repo("tester/refs", exist_ok=True)
    first = push("one")
    api.create_tag("tester/refs", tag="v1")
    api.create_branch("tester/refs", branch="dev/x", revision="v1")
    out["branch again"] = error(api.create_branch, "tester/refs", branch="dev/x")
    push("two", revision="dev/x")
    api.upload_file(path_or_fileobj=b"top", path_in_repo="top.txt", repo_id="tester/refs", commit_message="three")
    pull = push("four", create_pr=True)
    push("five", revision=pull.pr_revision)
    out["pull"] = [pull.pr_url, pull.pr_revision]
    out["stale"] = error(push, "six", parent_commit=first.oid)
    out["missing branch"] = error(push, "six", revision="nowhere")
    out["onto a tag"] = error(push, "six", revision="v1")
    refs = api.list_repo_refs("tester/refs", include_pull_requests=True)
    out["refs"] = [[one.ref for one in some] for some in (refs.branches, refs.tags, refs.pull_requests)]
    out["commits"] = [[one.title, one.authors] for one in api.list_repo_commits("tester/refs")]
    out["tree"] = [[type(one).__name__, one.path] for one in api.list_repo_tree("tester/refs")]
    deep = api.list_repo_tree("tester/refs", recursive=True, expand=True)
    out["deep"] = {one.path: one.last_commit.title for one in deep}
    out["sub"] = [one.path for one in api.list_repo_tree("tester/refs", "a")]
    out["no folder"] = error(lambda: list(api.list_repo_tree("tester/refs", "none")))
    info = api.get_paths_info("tester/refs", ["a", "top.txt", "none"], expand=True)
    out["paths"] = [[type(one).__name__, one.path, one.last_commit.title] for one in info]
    out["read"] = {
        revision: Path(hf_hub_download("tester/refs", "a/b.txt", revision=revision)).read_text()
        for revision in ["main", "v1", "dev/x", "refs/pr/1", first.oid]
    }
    out["no file"] = error(hf_hub_download, "tester/refs", "none.txt")
    out["no revision"] = error(hf_hub_download, "tester/refs", "top.txt", revision="none")
    api.delete_file("a/b.txt", "tester/refs")
    out["gone already"] = error(api.delete_file, "a/b.txt", "tester/refs")
    push("seven")
    api.delete_folder("a", "tester/refs")
    api.delete_tag("tester/refs", tag="v1")
    api.delete_branch("tester/refs", branch="dev/x")
    """
    )
    repo = hub.repos["tester/refs"]
    assert found["url"] == f"{hub.url}/tester/refs"
    assert found["again"][:2] == ["HfHubHTTPError", 409]
    assert found["branch again"][1] == 409
    assert found["pull"] == [f"{hub.url}/tester/refs/discussions/1", "refs/pr/1"]
    assert found["stale"][1] == 412
    assert found["missing branch"][0] == "RevisionNotFoundError"
    assert found["onto a tag"][0] == "RevisionNotFoundError"
    assert found["refs"] == [["refs/heads/main", "refs/heads/dev/x"], ["refs/tags/v1"], ["refs/pr/1"]]
    assert found["commits"] == [["three", ["tester"]], ["one", ["tester"]], ["initial commit", ["tester"]]]
    assert found["tree"] == [["RepoFile", ".gitattributes"], ["RepoFolder", "a"], ["RepoFile", "top.txt"]]
    assert found["deep"] == {".gitattributes": "initial commit", "a": "one", "a/b.txt": "one", "top.txt": "three"}
    assert found["sub"] == ["a/b.txt"]
    assert found["no folder"][0] == "RemoteEntryNotFoundError"
    assert found["paths"] == [["RepoFolder", "a", "one"], ["RepoFile", "top.txt", "three"]]
    first = repo.commits[1].sha
    assert found["read"] == {"main": "one", "v1": "one", "dev/x": "two", "refs/pr/1": "five", first: "one"}
    assert found["no file"][0] == "RemoteEntryNotFoundError"
    assert found["no revision"][0] == "RevisionNotFoundError"
    assert found["gone already"][1] == 404
    assert set(repo.files()) == {".gitattributes", "top.txt"}
    assert (set(repo.branches), repo.tags, set(repo.pull_requests)) == ({"main"}, {}, {"1"})


def test_tokens_decide_who_reads_and_writes(hub: HubServer, client: Client) -> None:
    setup = client(
        """
    out["me"] = api.whoami()["name"]
    create_repo("tester/open")
    create_repo("tester/secret", private=True)
    upload_file(path_or_fileobj=b"1", path_in_repo="f.txt", repo_id="tester/secret")
    create_repo("tester/rows", repo_type="dataset")
    upload_file(path_or_fileobj=b"a,b", path_in_repo="r.csv", repo_id="tester/rows", repo_type="dataset")
    out["rows"] = Path(hf_hub_download("tester/rows", "r.csv", repo_type="dataset")).read_text()
    out["info"] = [api.dataset_info("tester/rows").id, api.model_info("tester/secret").private]
    """
    )
    tries = """
    out["me"] = error(api.whoami)
    out["read"] = error(hf_hub_download, "tester/secret", "f.txt")
    out["open"] = error(api.model_info, "tester/open")
    out["write"] = error(api.upload_file, path_or_fileobj=b"2", path_in_repo="g.txt", repo_id="tester/open")
    out["propose"] = error(
        api.upload_file, path_or_fileobj=b"2", path_in_repo="g.txt", repo_id="tester/open", create_pr=True
    )
    out["create"] = error(create_repo, "tester/new")
    out["delete"] = error(api.delete_repo, "tester/open")
    """
    tokens = {"none": "", "wrong": "hf_wrong", "reader": hub.read_token, "stranger": hub.stranger_token}
    seen = {who: client(tries, home=who, token=token) for who, token in tokens.items()}
    statuses = {
        who: [result[key] and result[key][1] for key in ("open", "write", "propose", "create", "delete")]
        for who, result in seen.items()
    }
    assert setup["me"] == "tester"
    assert setup["rows"] == "a,b"
    assert setup["info"] == ["tester/rows", True]
    assert "datasets/tester/rows" in hub.repos
    assert statuses == {
        "none": [None, 401, 401, 401, 401],
        "wrong": [401, 401, 401, 401, 401],
        "reader": [None, 403, 403, 403, 403],
        "stranger": [None, 403, None, 403, 403],
    }
    assert seen["reader"]["read"] is None
    for who, status in {"none": "401", "stranger": "404"}.items():
        assert "Repository Not Found" in seen[who]["read"][2]
        assert status in seen[who]["read"][2]
    assert "g.txt" not in hub.repos["tester/open"].files()
    assert client("api.delete_repo('tester/open'); out['left'] = api.repo_exists('tester/open')")["left"] is False
    assert set(hub.repos) == {"tester/secret", "datasets/tester/rows"}


def test_cards_are_validated_and_read(hub: HubServer, client: Client) -> None:
    found = client(
        """
    metadata = [
        "language: en", 'license: "mit"', "tags:", "- early-exit", "- 'quoted: tag'",
        "pipeline_tag: text-classification", "model-index:", "- name: m", "  results: []",
    ]
    text = "\\n".join(["---", *metadata, "---", "# Title"])
    create_repo("tester/card")
    card = ModelCard(text)
    card.validate()
    card.push_to_hub("tester/card")
    out["loaded"] = ModelCard.load("tester/card").data.to_dict()
    info = api.model_info("tester/card", files_metadata=True)
    out["info"] = [info.pipeline_tag, info.library_name, info.tags, info.card_data.to_dict()]
    out["siblings"] = {one.rfilename: one.size for one in info.siblings}
    def put(content):
        api.upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id="tester/card")
    out["colon"] = error(put, text.replace('license: "mit"', "license: mit: no"))
    out["open"] = error(put, "---\\nlicense: mit\\n# Title")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out["bare"] = error(put, "# Title")
    out["warned"] = [str(one.message) for one in caught]
    """
    )
    card = {"language": "en", "license": "mit", "tags": ["early-exit", "quoted: tag"]}
    assert found["loaded"].items() >= card.items()
    assert found["info"][:2] == ["text-classification", None]
    assert found["info"][2] == ["text-classification", "early-exit", "quoted: tag"]
    assert found["info"][3].items() >= card.items()
    assert found["siblings"]["README.md"] == len(hub.repos["tester/card"].commits[1].files["README.md"])
    assert found["colon"][0] == "ValueError"
    assert "line 3" in found["colon"][2]
    assert "no closing ---" in found["open"][2]
    assert found["bare"] is None
    assert "no metadata" in found["warned"][0]
    assert len(hub.repos["tester/card"].commits) == 3


def test_ranges(hub: HubServer, client: Client) -> None:
    found = client(
        """
    create_repo("tester/range")
    upload_file(path_or_fileobj=b"0123456789", path_in_repo="n.bin", repo_id="tester/range")
    url = hf_hub_url("tester/range", "n.bin")
    for wanted in ["bytes=2-4", "bytes=7-", "bytes=-2", "bytes=20-"]:
        answer = get_session().get(url, headers={"Range": wanted})
        out[wanted] = [answer.status_code, answer.text[:5], answer.headers["Content-Range"]]
    head = get_hf_file_metadata(url)
    out["head"] = [head.etag, head.size, head.commit_hash]
    """
    )
    assert found["bytes=2-4"] == [206, "234", "bytes 2-4/10"]
    assert found["bytes=7-"] == [206, "789", "bytes 7-9/10"]
    assert found["bytes=-2"] == [206, "89", "bytes 8-9/10"]
    assert found["bytes=20-"] == [416, '{"err', "bytes */10"]
    assert found["head"] == [hashlib.sha256(b"0123456789").hexdigest(), 10, hub.repos["tester/range"].branches["main"]]


UPLOAD = """
    out["error"] = error(api.upload_file, path_or_fileobj=b"1", path_in_repo="f.txt", repo_id="tester/faults")
"""
DOWNLOAD = """
    out["error"] = error(lambda: out.update(size=len(Path(hf_hub_download("tester/faults", "big.bin")).read_bytes())))
"""
FAULT_CASES = [
    # kind, how often, for which requests, what the client does, status it reports (None: it recovers), its attempts
    ("500", 1, "preupload", UPLOAD, None, 2),
    ("500", 1, "POST .*/commit/", UPLOAD, 500, 1),
    ("429", 2, "preupload", UPLOAD, None, 3),
    ("412", 1, "POST .*/commit/", UPLOAD, 412, 1),
    ("401", 1, "preupload", UPLOAD, 401, 1),
    ("403", 1, "POST .*/commit/", UPLOAD, 403, 1),
    ("cut", 1, "GET .*/resolve/", DOWNLOAD, None, 2),
]


@pytest.mark.parametrize(("kind", "times", "match", "code", "status", "attempts"), FAULT_CASES)
def test_faults_reach_the_client(
    hub: HubServer, client: Client, kind: str, times: int, match: str, code: str, status: int | None, attempts: int
) -> None:
    repo = hub.add_repo("tester/faults", {"big.bin": bytes(50_000)})
    hub.fail(kind, times, match)
    found = client(code)
    assert (found["error"] and found["error"][1]) == status
    assert hub.count(match) == attempts
    assert ("Rate limited. Waiting 1.0s" in found["stderr"]) == (kind == "429")
    if code is UPLOAD:
        assert ("f.txt" in repo.files()) == (status is None)
    else:
        assert found["size"] == 50_000


def test_a_commit_whose_answer_is_lost_has_happened(hub: HubServer, client: Client) -> None:
    repo = hub.add_repo("tester/faults")
    hub.fail("cut", match="POST .*/commit/")
    assert client(UPLOAD)["error"][0] == "RemoteProtocolError"
    assert repo.files()["f.txt"] == b"1"


@pytest.mark.parametrize("match", ["HEAD .*/resolve/", "GET .*/resolve/"])
def test_a_slow_server_runs_into_the_timeouts_of_the_client(hub: HubServer, client: Client, match: str) -> None:
    hub.add_repo("tester/faults", {"big.bin": bytes(50_000)})
    hub.fail("slow", match=match, seconds=2.5)
    assert client(DOWNLOAD, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")["size"] == 50_000
    assert hub.count(match) >= 2, "the first request must have timed out"


def test_an_unknown_fault_is_refused(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        hub.fail("404")


def test_a_failure_of_the_stand_in_itself_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    def broken() -> None:
        with HubServer() as hub:
            del hub.accounts
            run_child(hub, tmp_path, "out['error'] = error(api.whoami)")

    with pytest.raises(RuntimeError, match="AttributeError"):
        broken()


def test_large_files_travel_through_xet(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    code = """
    data = os.urandom(300_000)
    Path("w.safetensors").write_bytes(data)
    create_repo("tester/xet")
    api.upload_file(path_or_fileobj="w.safetensors", path_in_repo="w.safetensors", repo_id="tester/xet")
    api.upload_file(path_or_fileobj="w.safetensors", path_in_repo="again.safetensors", repo_id="tester/xet")
    out["one"] = Path(hf_hub_download("tester/xet", "w.safetensors")).read_bytes() == data
    copy = CommitOperationCopy("w.safetensors", "copy.safetensors")
    api.create_commit("tester/xet", [copy], commit_message="copy")
    here = Path(snapshot_download("tester/xet", cache_dir="other"))
    out["all"] = [(here / f"{name}.safetensors").read_bytes() == data for name in ("w", "again", "copy")]
    """
    with HubServer(xet_dir=store) as hub:
        found = run_child(hub, tmp_path, code)
    repo = hub.repos["tester/xet"]
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert found["one"]
    assert found["all"] == [True, True, True]
    assert hub.count("lfs") == 0
    assert hub.count("xet-write-token") >= 1
    assert hub.count("GET .*/resolve/.*safetensors") == 0
    assert repo.commits[-1].lfs["w.safetensors"][:2] == (digest, 300_000)
    assert repo.commits[-1].files["w.safetensors"] == repo.commits[-1].lfs["w.safetensors"].text
