"""Shard sets in S3, by a server of moto (``pip install moto[server] s3fs``); else skipped."""

from __future__ import annotations

from itertools import islice

import pytest

from bigdet.config.data import CacheConfig
from bigdet.data.format.shard_set import ShardSet, UnavailableShardError
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.storage import RemoteStorage
from tests.unit.data.small_shards import write_set
from tests.unit.data.streams import open_stream

WHAT = "s3:// is tried with moto[server] and s3fs alone, which are not installed"


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("s3fs", reason=WHAT)
    server_module = pytest.importorskip("moto.server", reason=WHAT)
    boto3 = pytest.importorskip("boto3", reason=WHAT)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "no_proxy": host,
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


def ids_of(shards: ShardSet, workers: int) -> list[list[int]]:
    stream = open_stream(shards, order="windowed", window=16, workers=workers)
    ids = [batch.image_ids.tolist() for batch in islice(stream, 16)]
    stream.close()
    return ids


def test_a_set_in_s3_is_written_read_streamed_and_checked(bucket, tmp_path):
    local = write_set(tmp_path / "set", num_shards=2, per_shard=16)
    storage = RemoteStorage(f"{bucket}/set")
    for name in [shard.file for shard in local.manifest.shards] + ["index.npy", "manifest.json"]:
        storage.write(name, (local.folder / name).read_bytes())
    for mode in ("shards", "ranges"):
        cache = CacheConfig(folder=str(tmp_path / mode), gib=1, mode=mode)
        shards = ShardSet(f"{bucket}/set", cache=cache)
        assert all(shards.read(row) == local.read(row) for row in range(len(local)))
    for workers in (0, 2):
        cache = CacheConfig(folder=str(tmp_path / f"workers-{workers}"), gib=1)
        assert ids_of(ShardSet(f"{bucket}/set", cache=cache), workers) == ids_of(local, 0)
    assert list(check_shards(f"{bucket}/set")) == []
    absent = CacheConfig(folder=str(tmp_path / "absent"), gib=1)
    with pytest.raises(UnavailableShardError, match=r"s3://bucket/none: .* FileNotFoundError"):
        ShardSet(f"{bucket}/none", cache=absent)
