"""The inventory over real trees: plain directories, an Ollama store, a Hugging Face cache, and what goes wrong in them."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from sollol.errors import Reason, Retry, SollolError
from sollol.names import check_model_name
from structlog.testing import capture_logs

from agent.models import Inventory, ModelRoots, default_huggingface_dir, default_ollama_dir, model_roots
from tests.gguf_bytes import gguf, llama_metadata, llama_tensors

GOOD = gguf(llama_metadata(), llama_tensors())


def model_bytes(**more):
    return gguf(llama_metadata(**more), llama_tensors())


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "models"
    path.mkdir()
    return path


def put(path, content=GOOD):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def inventory(*directories, ollama=None, huggingface=None):
    found = Inventory(ModelRoots(directories, ollama, huggingface))
    found.scan()
    return found


def names(found):
    return [model.name for model in found.scan()]


def refusal_of(call, *arguments):
    with pytest.raises(SollolError) as caught:
        call(*arguments)
    return caught.value.refusal


def test_a_file_is_listed_by_its_stem_with_its_shape(root):
    path = put(root / "tiny.gguf", model_bytes(general__file_type=15, tokenizer__chat_template="{{ x }}"))
    found = inventory(root)
    (model,) = found.scan()
    assert (model.name, model.source, model.quantization) == ("tiny", "directory", "Q4_K_M")
    assert model.shape.layers == 2
    assert model.problem is None
    assert model.has_chat_template
    assert model.size_bytes == path.stat().st_size
    assert found.path_of("tiny") == path
    assert found.model("tiny") is model


def test_files_in_subdirectories_answer_to_their_path_too(root):
    path = put(root / "publisher" / "repo" / "m.gguf")
    found = inventory(root)
    assert found.scan()[0].aliases == ("publisher/repo/m",)
    assert found.path_of("publisher/repo/m") == found.path_of("m") == path


def test_a_directory_that_does_not_exist_holds_no_models(tmp_path):
    assert inventory(tmp_path / "none", ollama=tmp_path / "no", huggingface=tmp_path / "nowhere").scan() == ()


def test_one_bad_file_hides_no_other(root):
    put(root / "a.gguf", b"not a model")
    put(root / "b.gguf")
    put(root / "c.gguf", GOOD[:-40])
    (root / "d.gguf").symlink_to(root / "d.gguf")
    os.mkfifo(root / "e.gguf")
    found = inventory(root)
    by_name = {model.name: model for model in found.scan()}
    assert set(by_name) == {"a", "b", "c", "d"}
    assert by_name["b"].problem is None
    for name in "acd":
        assert by_name[name].shape is None
        assert by_name[name].problem.reason is Reason.MODEL_CORRUPT
        assert refusal_of(found.path_of, name) == by_name[name].problem
        assert refusal_of(found.model, name) == by_name[name].problem


def test_projectors_and_adapters_are_no_models(root):
    put(root / "mmproj-model-f16.gguf")
    put(root / "vision.gguf", gguf({"general.architecture": "clip"}))
    put(root / "lora.gguf", gguf({"general.architecture": "llama", "general.type": "adapter"}))
    put(root / "notes.txt")
    assert names(inventory(root)) == []


def part(number, count):
    items = list(llama_tensors().items())
    metadata = {"split.no": number, "split.count": count, "split.tensors.count": 5}
    return gguf(llama_metadata() | metadata if number == 0 else metadata, dict(items[2 * number : 2 * number + 2]))


def test_a_split_model_is_one_model_and_leads_to_its_first_part(root):
    paths = [put(root / f"big-{number:05d}-of-00003.gguf", part(number - 1, 3)) for number in (1, 2, 3)]
    found = inventory(root)
    (model,) = found.scan()
    assert model.name == "big"
    assert model.size_bytes == sum(path.stat().st_size for path in paths)
    assert found.path_of("big") == paths[0]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_split_model_with_a_missing_part_says_which(root, missing):
    for number in {1, 2, 3} - {missing}:
        put(root / f"big-{number:05d}-of-00003.gguf", part(number - 1, 3))
    (model,) = inventory(root).scan()
    assert model.name == "big"
    assert f"part {missing} of 3 is missing" in model.problem.message


def test_of_two_files_with_one_name_the_first_root_wins_and_the_other_is_reachable(tmp_path):
    first, second, third = (put(tmp_path / name / "m.gguf") for name in ("one", "two", "three"))
    found = inventory(first.parent, second.parent, third.parent)
    assert names(found) == ["m", "two/m", "three/m"]
    assert found.path_of("m") == first
    assert found.path_of("two/m") == second


def test_even_equal_long_names_stay_reachable(tmp_path):
    paths = [put(tmp_path / name / "models" / "m.gguf") for name in ("a", "b", "c")]
    found = inventory(*(path.parent for path in paths))
    assert names(found) == ["m", "models/m", "m@2"]
    assert found.path_of("m@2") == paths[2]


@pytest.mark.parametrize("file", ["my model (v2).gguf", "modèle.gguf", "-rf.gguf", "a..b.gguf", "..gguf", b"\xff.gguf"])
def test_every_listed_name_can_be_asked_for(root, file):
    put(root / os.fsdecode(file))
    found = inventory(root)
    (model,) = found.scan()
    check_model_name(model.name)
    assert found.path_of(model.name).read_bytes() == GOOD


def test_a_link_inside_the_roots_is_followed(tmp_path):
    target = put(tmp_path / "disk" / "blob.gguf")
    link = tmp_path / "models" / "linked.gguf"
    link.parent.mkdir()
    link.symlink_to(target)
    found = inventory(link.parent, target.parent)
    (model,) = found.scan()
    assert (model.name, model.aliases) == ("linked", ("blob",))
    assert found.path_of("blob") == link


def test_a_link_out_of_the_roots_is_refused(tmp_path, root):
    outside = put(tmp_path / "secret" / "s.gguf")
    (root / "s.gguf").symlink_to(outside)
    found = inventory(root)
    assert found.scan()[0].problem.reason is Reason.PATH_NOT_ALLOWED
    assert refusal_of(found.path_of, "s").reason is Reason.PATH_NOT_ALLOWED


def test_a_part_that_links_out_of_the_roots_is_refused(tmp_path, root):
    put(root / "b-00001-of-00002.gguf", part(0, 2))
    outside = put(tmp_path / "secret" / "x.gguf", part(1, 2))
    (root / "b-00002-of-00002.gguf").symlink_to(outside)
    assert inventory(root).scan()[0].problem.reason is Reason.PATH_NOT_ALLOWED


def test_links_to_directories_are_not_entered(tmp_path, root):
    put(root / "m.gguf")
    (root / "circle").symlink_to(root)
    (root / "out").symlink_to(put(tmp_path / "secret" / "s.gguf").parent)
    assert names(inventory(root)) == ["m"]


def test_directories_too_deep_are_left_out(root):
    put(root.joinpath(*"abcdefgh") / "deep.gguf")
    put(root.joinpath(*"abcdefghi") / "deeper.gguf")
    assert names(inventory(root)) == ["deep"]


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "m.gguf", "./m", "models/../m", "m\0", "", "x" * 10_000, "sub//m", "%6d", "*"],
)
def test_no_name_becomes_a_path(tmp_path, root, name):
    put(root / "m.gguf")
    put(tmp_path / "secret.gguf")
    refusal = refusal_of(inventory(root).path_of, name)
    assert refusal.reason is Reason.MODEL_NOT_FOUND
    assert len(refusal.message) < 300
    assert refusal.message.isprintable()


def test_an_unknown_name_is_answered_with_the_closest(root):
    put(root / "llama3.1-8b.gguf")
    refusal = refusal_of(inventory(root).model, "lama3.1-8b")
    assert "did you mean llama3.1-8b?" in refusal.message


def test_names_come_from_the_last_scan_only(root):
    found = inventory(root)
    path = put(root / "new.gguf")
    assert refusal_of(found.path_of, "new").reason is Reason.MODEL_NOT_FOUND
    found.scan()
    assert found.path_of("new") == path
    path.unlink()
    assert found.path_of("new") == path
    found.scan()
    assert refusal_of(found.path_of, "new").reason is Reason.MODEL_NOT_FOUND


def test_a_header_is_read_again_only_when_the_file_changed(root, monkeypatch):
    path = put(root / "m.gguf")
    read = []
    original = __import__("agent.models", fromlist=["read_model"]).read_model
    monkeypatch.setattr("agent.models.read_model", lambda parts: read.append(parts) or original(parts))
    found = inventory(root)
    before = found.scan()[0]
    assert len(read) == 1
    put(path, model_bytes(general__name="longer"))
    after = found.scan()[0]
    assert len(read) == 2
    assert before.identity != after.identity
    assert found.scan()[0] == after
    assert len(read) == 2


def test_a_disk_that_fails_once_makes_no_model_corrupt_for_ever(root, monkeypatch):
    path = put(root / "m.gguf")
    really_open = os.open

    def failing(name, *arguments, **more):
        if str(name) == str(path):
            raise OSError(errno.EIO, "Input/output error")
        return really_open(name, *arguments, **more)

    monkeypatch.setattr(os, "open", failing)
    found = inventory(root)
    (broken,) = found.scan()
    assert broken.problem.retry is Retry.RETRYABLE
    assert "Input/output error" in broken.problem.message
    monkeypatch.setattr(os, "open", really_open)
    assert found.scan()[0].problem is None


def test_what_cannot_be_looked_at_is_told_once_and_not_at_every_rescan(tmp_path):
    for name in ("models", "hub"):
        (tmp_path / name).write_text("a file where a directory should be")
    with capture_logs() as logs:
        found = inventory(tmp_path / "models", huggingface=tmp_path / "hub")
        for _ in range(3):
            assert found.scan() == ()
    assert [(entry["event"], entry["path"]) for entry in logs] == [
        ("model_directory_unreadable", str(tmp_path / "models")),
        ("huggingface_cache_unreadable", str(tmp_path / "hub")),
    ]


def test_the_identity_follows_size_time_and_header(root):
    path = put(root / "m.gguf")
    os.utime(path, ns=(1, 1))
    first = inventory(root).scan()[0].identity
    assert inventory(root).scan()[0].identity == first
    put(path, GOOD.replace(b"llama.context_length", b"llama.context_lengtx"))
    os.utime(path, ns=(1, 1))
    changed = inventory(root).scan()[0].identity
    os.utime(path, ns=(1, 2))
    assert len({first, changed, inventory(root).scan()[0].identity}) == 3


class OllamaStore:
    def __init__(self, path):
        self.path = path

    def pull(self, name, content=GOOD, host="registry.ollama.ai", layers=None, **model_layer):
        digest = hashlib.sha256(content).hexdigest()
        put(self.path / "blobs" / f"sha256-{digest}", content)
        if layers is None:
            layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": 1}
            layers = [{"mediaType": "application/vnd.ollama.image.template", "digest": "x"}, {**layer, **model_layer}]
        return self.write(name, json.dumps({"schemaVersion": 2, "layers": layers}).encode(), host)

    def write(self, name, manifest, host="registry.ollama.ai"):
        return put(self.path / "manifests" / host / name.replace(":", "/"), manifest)


@pytest.fixture
def store(tmp_path):
    return OllamaStore(tmp_path / "ollama")


def test_ollama_models_go_by_the_names_that_ollama_gives_them(store):
    store.pull("library/llama3.1:70b", model_bytes(general__name="a"))
    store.pull("someone/mine:q4", model_bytes(general__name="b"))
    store.pull("org/repo:Q4_K_M", model_bytes(general__name="c"), host="hf.co")
    found = inventory(ollama=store.path)
    assert names(found) == ["hf.co/org/repo:Q4_K_M", "llama3.1:70b", "someone/mine:q4"]
    assert found.path_of("llama3.1:70b").name.startswith("sha256-")
    assert found.model("llama3.1:70b").source == "ollama"


def test_the_latest_tag_may_be_left_out(store):
    store.pull("library/llama3:latest")
    found = inventory(ollama=store.path)
    assert found.path_of("llama3") == found.path_of("llama3:latest")


def test_tags_of_the_same_blob_are_one_model(store):
    store.pull("library/llama3:8b")
    store.pull("library/llama3:latest")
    (model,) = inventory(ollama=store.path).scan()
    assert (model.name, model.aliases) == ("llama3:8b", ("llama3:latest", "llama3"))


@pytest.mark.parametrize(
    "digest", ["sha256:../../../etc/passwd", "sha256:" + "a" * 63, "md5:" + "a" * 64, "", "sha256:" + "a" * 64 + "/x"]
)
def test_a_digest_that_is_none_never_becomes_a_path(store, digest):
    store.pull("library/bad:1", digest=digest)
    (model,) = inventory(ollama=store.path).scan()
    assert model.name == "bad:1"
    assert model.problem.reason is Reason.MODEL_CORRUPT
    assert "the digest" in model.problem.message


@pytest.mark.parametrize(
    "manifest", [b"", b"{", b"[]", b'{"layers": 7}', b'{"layers": [{}]}', b"\xff\xfe", b" " * (1024**2 + 1)]
)
def test_a_broken_manifest_hides_no_other_model(store, manifest):
    store.pull("library/good:1")
    store.write("library/broken:1", manifest)
    by_name = {model.name: model for model in inventory(ollama=store.path).scan()}
    assert by_name["good:1"].problem is None
    assert by_name["broken:1"].problem.reason is Reason.MODEL_CORRUPT


def test_a_missing_blob_is_a_problem_of_its_model(store):
    store.pull("library/gone:1", digest="sha256:" + "0" * 64)
    assert "cannot be read" in inventory(ollama=store.path).scan()[0].problem.message


def test_cloud_models_without_weights_are_left_out(store):
    store.pull("library/cloud:1", layers=[])
    store.write("library/cloud:2", b'{"layers": null}')
    assert names(inventory(ollama=store.path)) == []


def test_a_model_with_an_adapter_is_unsupported(store):
    layers = [{"mediaType": f"application/vnd.ollama.image.{kind}", "digest": "x"} for kind in ("model", "adapter")]
    store.pull("library/tuned:1", layers=layers)
    assert inventory(ollama=store.path).scan()[0].problem.reason is Reason.MODEL_UNSUPPORTED


def test_manifests_outside_of_ollamas_grammar_are_ignored(store, tmp_path):
    store.pull("library/.hidden:1")
    store.pull("library/sp ace:1")
    manifest = store.pull("library/ok:1")
    (manifest.parent / "linked").symlink_to(manifest)
    assert names(inventory(ollama=store.path)) == ["ok:1"]


def test_a_blob_that_links_out_of_the_store_is_refused(store, tmp_path):
    manifest = store.pull("library/m:1")
    (blob,) = (store.path / "blobs").iterdir()
    shutil.move(blob, tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    assert manifest.exists()
    assert inventory(ollama=store.path).scan()[0].problem.reason is Reason.PATH_NOT_ALLOWED


class HuggingFaceCache:
    def __init__(self, path):
        self.path = path

    def add(self, repository, file, content=GOOD, revision="aaa", main=True):
        base = self.path / f"models--{repository.replace('/', '--')}"
        blob = put(base / "blobs" / hashlib.sha256(content).hexdigest(), content)
        link = base / "snapshots" / revision / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if main:
            put(base / "refs" / "main", revision.encode())
        return link


@pytest.fixture
def cache(tmp_path):
    return HuggingFaceCache(tmp_path / "hub")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model-Q4_K_M.gguf", "org/repo:Q4_K_M"),
        ("model.q8_0.gguf", "org/repo:Q8_0"),
        ("model-IQ2_XXS.gguf", "org/repo:IQ2_XXS"),
        ("model-UD-Q4_K_XL.gguf", "org/repo:UD-Q4_K_XL"),
        ("BF16.gguf", "org/repo:BF16"),
        ("Q6_K/model.gguf", "org/repo:Q6_K"),
        ("model.gguf", "org/repo:model"),
    ],
)
def test_hugging_face_models_go_by_repository_and_quantization(cache, file, name):
    link = cache.add("org/repo", file)
    found = inventory(huggingface=cache.path)
    assert names(found) == [name]
    assert found.path_of(name) == link
    assert found.path_of(link.stem) == link
    assert found.model(name).source == "huggingface"


def test_a_split_hugging_face_model_keeps_the_names_of_its_parts(cache):
    files = [f"Q4_0/m-Q4_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    links = [cache.add("org/repo", file, part(number, 3)) for number, file in enumerate(files)]
    found = inventory(huggingface=cache.path)
    (model,) = found.scan()
    assert (model.name, model.aliases, model.problem) == ("org/repo:Q4_0", ("org/repo:m-Q4_0", "m-Q4_0"), None)
    assert found.path_of(model.name) == links[0]  # the link, not the blob: the engine finds the others by name


def test_the_revision_that_main_names_wins(cache):
    cache.add("org/repo", "m-Q4_0.gguf", model_bytes(general__name="old"), revision="zzz")
    current = cache.add("org/repo", "m-Q4_0.gguf", model_bytes(general__name="new"), revision="aaa")
    only_old = cache.add("org/repo", "m-Q8_0.gguf", model_bytes(general__name="other"), revision="zzz", main=False)
    found = inventory(huggingface=cache.path)
    assert found.path_of("org/repo:Q4_0") == current
    assert found.path_of("org/repo:Q8_0") == only_old
    assert len(found.scan()) == 2


def test_a_snapshot_that_links_out_of_the_cache_is_refused(cache, tmp_path):
    link = cache.add("org/repo", "m-Q4_0.gguf")
    link.unlink()
    link.symlink_to(put(tmp_path / "secret.gguf"))
    assert inventory(huggingface=cache.path).scan()[0].problem.reason is Reason.PATH_NOT_ALLOWED


def test_interrupted_downloads_and_other_directories_are_ignored(cache):
    put(cache.path / "models--org--broken" / "blobs" / "x.incomplete")
    put(cache.path / "datasets--org--data" / "snapshots" / "a" / "m.gguf")
    put(cache.path / "version.txt")
    assert names(inventory(huggingface=cache.path)) == []


def test_names_are_shared_fairly_between_sources(root, store, cache):
    put(root / "m.gguf", model_bytes(general__name="a"))
    cache.add("org/repo", "m.gguf", model_bytes(general__name="b"))
    found = inventory(root, ollama=store.path, huggingface=cache.path)
    assert names(found) == ["m", "org/repo:m"]


def test_ollamas_directory_is_its_variable_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr("agent.models.SYSTEM_OLLAMA_DIR", tmp_path / "system")
    environ = {"HOME": str(tmp_path)}
    assert default_ollama_dir(environ) is None
    (tmp_path / ".ollama" / "models" / "manifests").mkdir(parents=True)
    assert default_ollama_dir(environ) == tmp_path / ".ollama" / "models"
    (tmp_path / "system" / "manifests").mkdir(parents=True)
    assert default_ollama_dir(environ) == tmp_path / "system"
    assert default_ollama_dir({**environ, "OLLAMA_MODELS": "/big/ollama"}).as_posix() == "/big/ollama"


def test_either_programs_directory_can_be_named_found_or_left_out(tmp_path):
    environ = {"HOME": str(tmp_path), "OLLAMA_MODELS": "/big/ollama"}
    found = model_roots((tmp_path,), ollama="auto", huggingface="/big/hub", environ=environ)
    assert found == ModelRoots((tmp_path,), Path("/big/ollama"), Path("/big/hub"))
    assert model_roots((), ollama="", huggingface="", environ=environ) == ModelRoots()


def test_hugging_faces_directory_follows_its_variables(tmp_path):
    environ = {"HOME": str(tmp_path)}
    assert default_huggingface_dir(environ) is None
    (tmp_path / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    assert default_huggingface_dir(environ) == tmp_path / ".cache" / "huggingface" / "hub"
    assert default_huggingface_dir({**environ, "HF_HOME": "/hf"}).as_posix() == "/hf/hub"
    assert default_huggingface_dir({"HF_HOME": "/hf", "HF_HUB_CACHE": "/hub"}).as_posix() == "/hub"
