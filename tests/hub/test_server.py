"""The real huggingface_hub client against the loopback Hub."""


def test_a_pushed_file_comes_back(hub, hub_client):
    token = hub.user("ann", org="lab")
    client = hub_client(token)
    client.create_repo("lab/run", private=True)
    client.upload_file(path_or_fileobj=b"\0" * 20_000, path_in_repo="a.safetensors", repo_id="lab/run")
    assert hub.files("lab/run") == ["a.safetensors"]
    with open(client.hf_hub_download("lab/run", "a.safetensors"), "rb") as file:
        assert file.read() == b"\0" * 20_000
