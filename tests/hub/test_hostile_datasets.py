"""Data sets of the Hub that would have files read, or addresses asked, that are not their own."""

import io
import zipfile

import datasets
import hub_client
import PIL.Image
import pytest

SIZES = ["(8, 8)", "(9, 9)"]


def encoded(size: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(rows, **features) -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(buffer)
    return buffer.getvalue()


def rows_with(path: str, size: int = 8) -> bytes:
    """Two rows, the second of which names a file."""
    images = [{"bytes": encoded(size), "path": "0.png"}, {"bytes": None, "path": path}]
    table = datasets.Dataset.from_list(
        [{"image": image, "label": 0} for image in images],
        features=datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a"])}),
    )
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table.cast_column("image", datasets.Image()).data.table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["local", "relative", "url", "archive", "hub", "climbing"])
def test_an_image_is_not_read_from_outside_of_the_repository(kind, client, hub, tmp_path):
    (tmp_path / "private.png").write_bytes(encoded(9))
    with zipfile.ZipFile(tmp_path / "private.zip", "w") as archive:
        archive.writestr("private.png", encoded(9))
    hub.plant("datasets/evil/other", {"private.png": encoded(9)})
    path = {
        "local": str(tmp_path / "private.png"),
        "relative": "private.png",
        "url": f"{hub.endpoint}/private.png",
        "archive": f"zip://private.png::{tmp_path}/private.zip",
        "hub": "hf://datasets/evil/other@main/private.png",
        "climbing": f"hf://datasets/evil/{kind}@main/../../other@main/private.png",
    }[kind]
    hub.plant(f"datasets/evil/{kind}", {"data/train.parquet": rows_with(path)})
    found = client(hub_client.first_sizes, f"evil/{kind}")
    assert found.pop("targets of a stream") == ["None", "None"]  # which need no image
    for message in found.values():
        assert "DataError: Example 1: the column 'image' names the file" in message
        assert repr(path) in message
        assert f"which is not of the data set 'evil/{kind}'" in message
    assert not [request for _, request, _ in hub.requests if "private" in request]


def test_a_repository_of_images_is_read(client, hub):
    hub.plant("datasets/alice/images", {f"train/{name}/{n}.png": encoded(n) for name, n in (("a", 8), ("b", 9))})
    found = client(hub_client.first_sizes, "alice/images")
    assert found == {
        "load_hf_dataset": SIZES, "from_hf": SIZES, "stream": SIZES, "targets of a stream": ["None", "None"]
    }  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_images_that_a_table_of_the_repository_names_are_read(packed, client, hub):
    files = {"8.png": encoded(8), "9.png": encoded(9), "metadata.csv": b"file_name,label\n8.png,0\n9.png,0\n"}
    if packed:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        files = {"train.zip": buffer.getvalue()}
    hub.plant(f"datasets/alice/table-{packed}", files)
    found = client(hub_client.first_sizes, f"alice/table-{packed}", class_names=["a"])
    assert [found[way] for way in ("load_hf_dataset", "from_hf", "stream")] == [SIZES] * 3


def test_images_of_ones_own_stand_beside_rows_of_the_hub(client, hub, tmp_path):
    (tmp_path / "own.png").write_bytes(encoded(9))
    rows = [{"text": str(tmp_path / "own.png"), "label": 0}]
    table = parquet(rows, text=datasets.Value("string"), label=datasets.Value("int64"))
    hub.plant("datasets/alice/texts", {"data/train.parquet": table})
    assert client(hub_client.images_of_ones_own, "alice/texts", str(tmp_path / "own.png")) == [(9, 9)] * 3


@pytest.mark.parametrize(
    ("name", "description", "path"),
    [
        ("address", "data_files: {hub}/meta-data.csv", "{hub}/meta-data.csv"),
        ("split", "data_files: [{{split: train, path: ['{hub}/meta-data.csv']}}]", "{hub}/meta-data.csv"),
        ("hub", "data_files: hf://datasets/evil/others/meta-data.csv", "hf://datasets/evil/others/meta-data.csv"),
        ("local", "data_files: ['/etc/passwd']", "/etc/passwd"),
        ("scheme", "data_files: 'file:/etc/passwd'", "file:/etc/passwd"),
        ("climbing", "data_files: ['data/*', 'data/../../others/*']", "data/../../others/*"),
        ("folder", "data_dir: ../others", "../others"),
    ],
)
def test_a_description_names_files_of_the_repository_alone(name, description, path, client, hub):
    description = f"configs:\n- config_name: fine\n- config_name: x\n  {description.format(hub=hub.endpoint)}\n"
    for file, text in (("README.md", f"---\n{description}---\n"), (".huggingface.yaml", description)):
        repo_id = f"evil/{name}-{file.strip('.')}"
        hub.plant(f"datasets/{repo_id}", {file: text.encode(), "data/train.parquet": rows_with("0.png")})
        message = client(hub_client.why_refused, repo_id)
        assert message.startswith(f"DataError: {file} of '{repo_id}' names the data_")
        assert repr(path.format(hub=hub.endpoint)) in message
    assert not [request for _, request, _ in hub.requests if "meta-data" in request or "others" in request]


def test_nothing_is_loaded_unchecked_where_the_hub_fails_for_a_moment(client, hub):
    readme = f"---\nconfigs:\n- config_name: x\n  data_files: {hub.endpoint}/meta-data.csv\n---\n"
    hub.plant("datasets/evil/moment", {"README.md": readme.encode(), "data/train.parquet": rows_with("0.png")})
    hub.fail("GET", r"/api/datasets/evil/moment($|\?)", 500)
    message = client(hub_client.why_refused, "evil/moment")
    assert message.startswith("DataError: The Hub does not tell which files 'evil/moment' consists of: ")
    assert not [request for _, request, _ in hub.requests if "meta-data" in request]


def test_the_commit_that_was_checked_is_loaded(client, hub):
    table = parquet([{"image": {"bytes": encoded(8), "path": None}, "label": 0}],
                    image=datasets.Image(), label=datasets.ClassLabel(names=["a"]))  # fmt: skip
    hub.plant("datasets/alice/fine", {"README.md": b"---\nlicense: mit\n---\n", "data/train.parquet": table})
    assert client(hub_client.why_refused, "alice/fine") == "not refused"
    asked = [path.split("/") for _, path, _ in hub.requests if "alice/fine" in path]
    assert asked
    assert not [parts for parts in asked if "main" in parts]


def test_a_script_is_not_run_and_the_way_out_is_named(client, hub, tmp_path):
    script = f"open({str(tmp_path / 'trace')!r}, 'w')".encode()
    hub.plant("datasets/evil/script", {"script.py": script})
    message = client(hub_client.why_refused, "evil/script")
    assert "DataError: No dataset could be loaded from 'evil/script': it holds a script, which is not run" in message
    assert "revision='refs/convert/parquet'" in message
    assert not (tmp_path / "trace").exists()
