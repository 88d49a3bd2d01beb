"""A static Space is pushed to a Hub on loopback, by the real client."""

import json

import pytest
import yaml
from commands import run
from scenes import connected

from mxd.explorer.publish import push_space
from mxd.hub_cards.hub import HubError
from mxd.jobs.explore import explorer_site


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path) as server:
        yield server


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    (folder / "data" / "2").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>")
    (folder / "data" / "index.json").write_text("{}")
    return folder


def test_the_command_pushes_a_space(hub, made):
    code, output, error = run("explore", made.folder, "--space", "user/explorer")
    assert code == 0, error
    assert f"{hub.url}/spaces/user/explorer" in output
    files = hub.files("user/explorer")
    assert {"index.html", "app.js", "style.css", "README.md", "data/index.json", "data/2/0.json"} <= files.keys()
    card = yaml.safe_load(files["README.md"].split(b"---\n")[1])
    assert card["sdk"] == "static" == hub.repos["user/explorer"].sdk and card["app_file"] == "index.html"
    assert card["title"] == "<b>demo" and "models" not in card
    index = json.loads(files["data/index.json"])
    assert index["api"] is False and str(made.folder.parent) not in json.dumps(index)


def test_a_repo_on_the_hub_is_explored(hub, made):
    files = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    hub.create("user/demo", files)
    site = explorer_site("user/demo@main")
    assert site.about["name"] == "user/demo@main" and site.value("2/3.json")
    hub.create("user/bare", {name: data for name, data in files.items() if name != "experts.safetensors"})
    with pytest.raises(ValueError, match=r"user/bare has no experts\.safetensors: `mxd experts FOLDER`"):
        explorer_site("user/bare")
    with pytest.raises(ValueError, match="neither a folder"):
        explorer_site("user/nowhere")


def test_another_push_replaces_the_data(hub, site):
    push_space(site, "user/explorer", "demo", "user/mxd-demo")
    (site / "data" / "index.json").rename(site / "data" / "2" / "0.json")
    push_space(site, "user/explorer", "demo", "user/mxd-demo")
    assert {name for name in hub.files("user/explorer") if name.startswith("data/")} == {"data/2/0.json"}
    assert b"models:\n- user/mxd-demo\n" in hub.files("user/explorer")["README.md"]
    assert ".gitattributes" in hub.files("user/explorer")


@pytest.mark.parametrize("call", ["POST /api/repos/create", "GET /api/spaces/.*tree", "POST /api/spaces/.*commit"])
def test_errors_that_pass_are_tried_again(hub, site, call):
    method, pattern = call.split()
    hub.fail(method, pattern, 503, times=2)
    assert push_space(site, "user/explorer", "demo") == f"{hub.url}/spaces/user/explorer"
    assert "index.html" in hub.files("user/explorer")


def test_a_refusal_says_what_to_do(hub, site):
    hub.fail("POST", "/api/repos/create", 401, times=100)
    with pytest.raises(HubError, match="hf auth login"):
        push_space(site, "user/explorer", "demo")


def test_a_name_that_is_none_is_refused_before_the_export(hub, made, tmp_path):
    code, _, error = run("explore", made.folder, "--space", "not a name", "--export", tmp_path / "copy")
    assert code == 1 and "'not a name' is no name of a Space: write user/name" in error
    assert not hub.repos and not (tmp_path / "copy").exists()
