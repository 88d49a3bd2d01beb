"""Push, search and load against a Hub on loopback, by the real client."""

import json
import os
import re

import pytest
import torch
import warm_process
from factories import with_directions
from faults import command
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, AutoModelForCausalLM

from mxd import demo
from mxd.hub_cards import OLDEST_TRANSFORMERS, HubError, list_decompositions, push_decomposition, show_decomposition
from mxd.jobs.decompositions import load_decomposition, made_how
from mxd.modeling_mxd import DIRECTIONS_NAME, MxDModel, Steering
from mxd.modeling_mxd.configuration_mxd import AUTO_MAP

REPO = "user/mxd-tiny"


def weights(hub, revision="main"):
    return {name: data for name, data in hub.files(REPO, revision).items() if name.endswith(".safetensors")}


def assert_complete(hub, folder, revision="main"):
    files = hub.files(REPO, revision)
    assert weights(hub, revision) == {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert {"README.md", "config.json", "modeling_mxd.py", "layers.py", "surgery.py"} <= files.keys()
    assert "__init__.py" not in files


def test_everything_in_one_commit(hub, folder, base):
    (folder / "training_arguments.json").write_text("{}")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"x")
    push_decomposition(folder, REPO)
    assert_complete(hub, folder)
    assert len(hub.repos[REPO].commits) == 2  # the empty repo's and ours
    assert not {name for name in hub.files(REPO) if "checkpoint" in name or "arguments" in name}
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("mxd", "user/base", "mit")
    config = json.loads(hub.files(REPO)["config.json"])
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("user/base", base)
    assert hub.token not in "".join(str(data) for data in hub.files(REPO).values())


def test_the_code_that_loads_it_is_ours_whatever_the_folder_names(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "another/repo--modeling_mxd.MxDModel"}
    (folder / "config.json").write_text(json.dumps(config))
    push_decomposition(folder, REPO)
    assert json.loads(hub.files(REPO)["config.json"])["auto_map"] == AUTO_MAP


def test_a_second_push_replaces_and_keeps_what_was_written_by_hand(hub, folder, tmp_path):
    push_decomposition(folder, REPO)
    api = HfApi()
    readme = hub.files(REPO)["README.md"].decode().replace("license: mit", "license: cc0-1.0")
    readme += "\nRead by hand: expert 7 likes commas.\n"
    api.upload_file(path_or_fileobj=readme.encode(), path_in_repo="README.md", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    one = tmp_path / "one"
    MxDModel.from_pretrained(folder, layers=[2]).save_pretrained(one)
    push_decomposition(one, REPO)
    assert_complete(hub, one)  # the two shards of before and their index are gone
    assert "model.safetensors.index.json" not in hub.files(REPO)
    assert hub.files(REPO)["notes.txt"] == b"mine"
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert "expert 7 likes commas" in card.text
    assert card.data.license == "cc0-1.0"
    push_decomposition(one, REPO, license="mit")
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "mit"


def test_branch_private_and_pull_request(hub, folder):
    push_decomposition(folder, REPO, private=True, revision="try")
    assert hub.repos[REPO].private
    assert not weights(hub)
    assert_complete(hub, folder, "try")
    pushed = push_decomposition(folder, REPO, create_pr=True)
    assert pushed.pr_url.endswith("/discussions/1")
    assert not weights(hub)
    assert_complete(hub, folder, "refs/pr/1")


def test_a_branch_is_measured_by_its_name(hub, folder):
    push_decomposition(folder, REPO, revision="try")
    loaded, saved = load_decomposition(f"{REPO}@try"), MxDModel.from_pretrained(folder)
    assert all(torch.equal(weight, saved.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert made_how(f"{REPO}@try") == made_how(str(folder))
    with pytest.raises(ValueError, match=f"'{REPO}@none' is no folder with a decomposition"):
        load_decomposition(f"{REPO}@none")


def test_what_is_made_from_a_gated_model_is_not_made_public_without_a_word(hub, folder, base, caplog):
    name = MxDModel.from_pretrained(folder).config.base_model_name_or_path
    push_decomposition(folder, REPO)
    assert "gated" not in caplog.text
    hub.repos[name].gated = True
    push_decomposition(folder, REPO, private=True)
    assert "gated" not in caplog.text
    push_decomposition(folder, REPO)
    assert f"the base model {name} is gated" in caplog.text


def test_anothers_commit_in_between_is_not_overwritten(hub, folder):
    push_decomposition(folder, REPO)
    hub.fail("POST", "/commit/", status=412)
    before = len(hub.repos[REPO].commits)
    push_decomposition(folder, REPO)
    assert len(hub.repos[REPO].commits) == before + 1


def test_a_commit_between_look_up_and_push_is_not_overwritten(hub, folder, monkeypatch):
    push_decomposition(folder, REPO)
    create_commit = HfApi.create_commit

    def after_anothers(*args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        files = hub.files(REPO)
        hub.repos[REPO].add("main", {**files, "README.md": files["README.md"] + b"\nRead by hand.\n"}, "theirs")
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", after_anothers)
    push_decomposition(folder, REPO, message="ours")
    assert [commit["title"] for commit in hub.repos[REPO].commits[-2:]] == ["theirs", "ours"]
    assert b"Read by hand." in hub.files(REPO)["README.md"]


@pytest.mark.parametrize("fault", [{"mode": "half"}, {"mode": "drop"}, {"status": 500}, {"status": 403}], ids=str)
def test_after_a_broken_upload_a_repeat_sends_only_what_the_hub_lacks(hub, folder, fault):
    shards = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert len(shards) == 2
    hub.fail("PUT", "^/lfs/", times=10**6, after=1, **fault)  # the first shard arrives, the other never does
    with pytest.raises(HubError):
        push_decomposition(folder, REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}
    (arrived,) = hub.objects.values()
    hub.faults.clear()
    hub.received.clear()
    push_decomposition(folder, REPO)
    sent = [size for (method, _), size in hub.received.items() if method == "PUT"]
    assert sent == [sum(shards.values()) - len(arrived)]
    assert_complete(hub, folder)
    hub.received.clear()
    push_decomposition(folder, REPO)
    assert not [path for method, path in hub.received if method == "PUT"]


def test_an_upload_that_breaks_once_is_gone_on_with_in_the_same_push(hub, folder):
    hub.fail("PUT", "^/lfs/", after=1, mode="half")
    push_decomposition(folder, REPO)
    sent = [size for (method, _), size in hub.received.items() if method == "PUT"]
    assert sorted(sent) == sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert_complete(hub, folder)
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "but no decomposition"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda folder: next(folder.glob("*00001-of*")).unlink(), "layers.0.decoder.weight is missing"),
        (lambda folder: next(folder.glob("*00001-of*")).write_bytes(b"abc"), "no complete safetensors file"),
    ],
)
def test_a_folder_that_is_not_complete_is_refused_before_anything_is_sent(hub, folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        push_decomposition(folder, REPO)
    assert REPO not in hub.repos
    assert not hub.requests


def test_a_base_that_others_cannot_load_is_refused(hub, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for name, message in ((demo.MODEL_NAME, "is on no Hub"), (str(tmp_path / "base"), "is no Hub id")):
        config["base_model_name_or_path"] = name
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            push_decomposition(folder, REPO)
    with pytest.raises(HubError, match="user/nothing: there is no such repo"):
        push_decomposition(folder, REPO, base_model="user/nothing")
    assert REPO not in hub.repos
    push_decomposition(folder, REPO, base_model="user/base")
    assert str(tmp_path) not in "".join(str(data) for data in hub.files(REPO).values())


def test_without_a_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="token"):
        push_decomposition(folder, REPO)
    assert REPO not in hub.repos


def test_catalogue(hub, folder, tmp_path):
    for index in range(5):  # more than a page
        push_decomposition(folder, f"user/mxd-{index}")
    one = tmp_path / "one"
    MxDModel.from_pretrained(folder, layers=[2]).save_pretrained(one)
    push_decomposition(one, "org/single")
    hub.create("user/else", {"README.md": b"---\nlibrary_name: transformers\n---\n"})
    hostile = "{layers: 7, num_experts: [1], method: {}, cross_entropy_rise: 0}"
    hub.create("user/hostile", {"README.md": f"---\ntags: [mxd]\nmxd: {hostile}\n---\n".encode()})
    hub.requests.clear()
    found = {info.repo_id: info for info in list_decompositions()}
    assert set(found) == {*(f"user/mxd-{index}" for index in range(5)), "org/single", "user/hostile"}
    assert all(path.startswith("/api/models") for _, path, _ in hub.requests)
    info = found["user/mxd-3"]
    assert (info.base_model, info.layers, info.num_experts, info.num_experts_per_tok) == ("user/base", [0, 2], 24, 4)
    assert found["user/hostile"].layers == [] and found["user/hostile"].cross_entropy_rise == 0
    assert {info.repo_id for info in list_decompositions(layer=0)} == {f"user/mxd-{index}" for index in range(5)}
    assert [info.repo_id for info in list_decompositions("SINGLE")] == ["org/single"]
    assert len(list(list_decompositions("base", limit=3))) == 3
    assert len(list(list_decompositions(base_model="user/base"))) == 6
    assert [info.repo_id for info in list_decompositions(author="org")] == ["org/single"]


def test_show_downloads_no_weights(hub, folder):
    pushed = push_decomposition(folder, REPO)
    hub.requests.clear()
    details = show_decomposition(REPO)
    assert details.commit == pushed.oid
    assert details.config.layers == [0, 2]
    assert details.weight_bytes == sum(map(len, weights(hub).values()))
    code, printed = command("show", REPO)
    assert code == 0
    assert f"needs: transformers {OLDEST_TRANSFORMERS} or later, the base model user/base at" in printed
    assert not [path for _, path, _ in hub.requests if path.endswith((".safetensors", ".py"))]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": b'{"model_type": "llama"}'}, "no decomposition"),
        ({"config.json": b"[" * 50_000}, "not valid JSON"),
        ({"config.json": b'{"a": "' + b"x" * 10_000_000 + b'"}'}, "larger than"),
        ({"config.json": b'{"model_type": "mxd", "format_version": 1, "num_experts": 1e400}'}, "num_experts"),
        ({"config.json": b'{"model_type": "mxd", "format_version": 1, "num_experts": 1000000000000}'}, "num_experts"),
        ({"config.json": b'{"model_type": "mxd", "format_version": 1, "layers": [1, 1]}'}, "layer 1 more than once"),
        ({"config.json": b'{"model_type": "mxd"}'}, "before the first release"),
        ({"config.json": b'{"model_type": "mxd", "format_version": 99, "new": 1}'}, "newer"),
        ({"config.json": b'{"model_type": "mxd", "format_version": 1, "new": 1}'}, "'new' is not a field"),
        ({"config.json": b'{"model_type": "mxd", "format_version": 1, "hidden_act": "__import__"}'}, "hidden_act"),
    ],
)
def test_hostile_repos_are_refused(hub, files, message):
    hub.create(REPO, files)
    with pytest.raises(ValueError, match=message):
        show_decomposition(REPO)


def test_show_of_what_is_not_there(hub):
    with pytest.raises(HubError, match="there is no such repo"):
        show_decomposition("user/nothing")


LOAD = """
import json, sys
if {hide}:
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "mxd":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Hidden())
else:
    from mxd import modeling_mxd
import torch
from transformers import AutoModel, AutoModelForCausalLM
kwargs = dict(trust_remote_code=True, **json.loads({kwargs!r}))
lm = AutoModelForCausalLM.from_pretrained({repo!r}, **kwargs)
mxd = AutoModel.from_pretrained({repo!r}, **kwargs)
torch.save((lm(torch.arange(2, 12)[None]).logits, mxd.config.layers, type(mxd).__module__), {out!r})
"""


def load(hub, tmp_path, hide, offline=False, **kwargs):
    script, out = tmp_path / "load.py", tmp_path / "out.pt"
    script.write_text(LOAD.format(hide=hide, repo=REPO, out=str(out), kwargs=json.dumps(kwargs)))
    in_a_process(hub, tmp_path, script, offline=offline)
    return torch.load(out)


def in_a_process(hub, tmp_path, *arguments, offline=False):
    """Python in a process of its own whose Hub is that on loopback, with a cache of its own; gives what it printed."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = warm_process.run(*arguments, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("hide", [True, False], ids=["without the library", "with the library"])
def test_both_doors_of_a_pushed_private_repo_then_offline(hub, folder, tmp_path, expected, hide):
    first = push_decomposition(folder, REPO, private=True)
    logits, layers, module = load(hub, tmp_path, hide)
    assert torch.equal(logits, expected)
    assert layers == [0, 2]
    assert module.startswith("transformers_modules" if hide else "mxd.modeling_mxd")
    before = len(hub.requests)
    assert torch.equal(load(hub, tmp_path, hide, offline=True)[0], expected)
    assert len(hub.requests) == before
    one = tmp_path / "one"
    MxDModel.from_pretrained(folder, layers=[2]).save_pretrained(one)
    push_decomposition(one, REPO)
    assert load(hub, tmp_path, hide)[1] == [2]
    assert torch.equal(load(hub, tmp_path, hide, revision=first.oid)[0], expected)


RUN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mxd":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
exec(open(sys.argv[1]).read())
torch.save((values, indices), sys.argv[2])
"""


def test_the_card_s_snippet_runs_for_a_reader_without_the_library(hub, folder, base_with_tokenizer, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"base_model_revision": base_with_tokenizer}
    (folder / "config.json").write_text(json.dumps(config))
    push_decomposition(folder, REPO)
    snippet, script, out = tmp_path / "snippet.py", tmp_path / "run.py", tmp_path / "out.pt"
    card = ModelCard(hub.files(REPO)["README.md"].decode()).text
    snippet.write_text("\n".join(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)))
    script.write_text(RUN)
    hub.requests.clear()
    in_a_process(hub, tmp_path, script, snippet, out)
    values, indices = torch.load(out)
    assert values.shape == indices.shape
    assert (indices.shape[-1], values.isfinite().all()) == (4, True)
    got = {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET" and f"{REPO}/resolve" in path}
    assert {"modeling_mxd.py", "model-00001-of-00002.safetensors"} <= got


def test_one_layer_downloads_only_its_shard(hub, folder, tmp_path):
    push_decomposition(folder, REPO)
    hub.requests.clear()
    assert load(hub, tmp_path, True, layers=[2])[1] == [2]
    got = {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET" and "mxd-tiny/resolve" in path}
    assert "model-00002-of-00002.safetensors" in got
    assert "model-00001-of-00002.safetensors" not in got


def test_a_licence_that_the_hub_does_not_know_comes_with_its_name(hub, folder):
    said = {"license": "other", "license_name": "tiny-research"}
    front = "".join(f"{name}: {value}\n" for name, value in said.items())
    hub.repos["user/base"].add(
        "main", {**hub.files("user/base"), "README.md": f"---\n{front}---\n".encode()}, "licence"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_model_revision": None}))
    for _ in range(2):
        push_decomposition(folder, REPO)
        card = ModelCard(hub.files(REPO)["README.md"].decode())
        assert (card.data.license, card.data.license_name) == ("other", "tiny-research")
    push_decomposition(folder, REPO, license="mit")
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.get("license_name") is None


def test_files_by_hand_are_kept_modules_too(hub, folder):
    push_decomposition(folder, REPO)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="handler.py", repo_id=REPO)
    push_decomposition(folder, REPO)
    assert hub.files(REPO)["handler.py"] == b"mine"


def test_options_of_the_commands(hub, folder):
    how = ("--private", "--create-pr", "--license", "cc0-1.0", "--message", "mine")
    code, said = command("push", folder, REPO, *how)
    assert code == 0 and 'revision="refs/pr/1"' in said
    assert hub.repos[REPO].private and hub.repos[REPO].commits[-1]["title"] == "mine"
    assert b"license: cc0-1.0" in hub.files(REPO, "refs/pr/1")["README.md"]
    push_decomposition(folder, "user/a")
    assert "user/a" in command("search", "base", "--layer", "2", "--author", "user", "--limit", "1")[1]
    assert "none found" in command("search", "--layer", "1")[1]


@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM])
def test_directions_go_along_and_are_downloaded_when_asked_for(hub, folder, tmp_path, door):
    with_directions(MxDModel.from_pretrained(folder)).save_pretrained(folder)
    (folder / "experts.safetensors").write_bytes((folder / DIRECTIONS_NAME).read_bytes())
    push_decomposition(folder, REPO)
    assert_complete(hub, folder)
    model = door.from_pretrained(REPO)
    with_directions(MxDModel.from_pretrained(folder)).save_pretrained(tmp_path / "other")
    push_decomposition(tmp_path / "other", REPO)
    assert_complete(hub, tmp_path / "other")  # experts.safetensors of the earlier push is gone
    assert not [path for method, path, _ in hub.requests if method == "GET" and DIRECTIONS_NAME in path]
    found, expected = (
        m.directions(2) for m in (getattr(model, "decomposition", model), MxDModel.from_pretrained(folder))
    )
    assert torch.equal(found.direction, expected.direction)  # of the commit that was loaded


def test_a_steering_goes_along_and_loads_with_the_model(hub, folder):
    with_directions(MxDModel.from_pretrained(folder)).save_pretrained(folder)
    Steering([{"layer": 0, "expert": 3, "strength": 50.0}]).to_json(folder / "formal.json")
    (folder / "notes.json").write_text('{"changes": []}')
    push_decomposition(folder, REPO)
    assert "formal.json" in hub.files(REPO) and "notes.json" not in hub.files(REPO)
    ids, plain = torch.arange(2, 12)[None], AutoModelForCausalLM.from_pretrained(REPO)
    steered = AutoModelForCausalLM.from_pretrained(REPO, steering="formal.json", trust_remote_code=True)
    with torch.no_grad(), plain.steer(folder / "formal.json"):
        assert torch.equal(steered(ids).logits, plain(ids).logits)
    steered.unsteer()
    assert torch.equal(steered(ids).logits, plain(ids).logits)


def test_directions_that_do_not_fit_are_not_pushed(hub, folder):
    (folder / DIRECTIONS_NAME).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"directions.safetensors of .* is refused"):
        push_decomposition(folder, REPO)
    assert REPO not in hub.repos
