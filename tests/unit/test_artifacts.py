"""Addresses, buckets and champion pointers, on a real S3 API."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelloop import artifacts
from labelloop.artifacts import Bucket, Champions, is_plain_key, parse_s3_uri, s3_uri
from labelloop.errors import ConflictError, ModelError, StorageError, TooLargeError
from tests import examples

ODD_NAMES = (
    *("plain", "with space", "50%", "50%20off", "a#b", "a?b=c", "a+b", "ü-é-雪-🙂", "a&b;c,d=e", "[x]{y}", "a\\b", "'\""),
    *("a:b@c", "..x", "~", "-"),
)
ODD_KEYS = [f"images/digits/{name}.png" for name in ODD_NAMES]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_an_address_leads_back_to_its_key(key: str) -> None:
    assert parse_s3_uri(s3_uri("bucket", key)) == ("bucket", key)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_every_key_survives_its_address(key: str) -> None:
    uri = s3_uri("my-bucket.name", key)
    assert parse_s3_uri(uri) == ("my-bucket.name", key)


@pytest.mark.parametrize("uri", ["", "s3://", "s3://bucket", "s3://bucket/", "s3:///key", "https://bucket/key", "bucket/key"])
def test_what_is_no_address_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="is no s3://"):
        parse_s3_uri(uri)


def test_an_address_is_read_as_label_studio_reads_it() -> None:
    """It takes what follows the bucket for the key, letter by letter, when it signs an address for the browser."""
    assert parse_s3_uri("s3://bucket/a b%20c.png?v#1") == ("bucket", "a b%20c.png?v#1")


@pytest.mark.parametrize("key", ODD_KEYS)
def test_objects_with_odd_keys_are_written_and_read(bucket: Bucket, key: str) -> None:
    assert is_plain_key(key)
    bucket.put(key, b"content")
    assert bucket.get(key) == b"content"
    assert bucket.size(key) == 7
    stored = boto3.client("s3").list_objects_v2(Bucket=bucket.name)["Contents"]
    assert [entry.get("Key") for entry in stored] == [key], "other clients find it under the same key"
    assert bucket.keys("images/") == [key]


@pytest.mark.parametrize("key", ["a//b", "/a", "a/", "a/../b", "./a", "a\nb", "a\x00b", ""])
def test_keys_that_cannot_be_addressed_are_known(key: str) -> None:
    assert not is_plain_key(key)


@pytest.mark.parametrize("key", ["a//b", "a/../b", "a\nb"])
def test_a_key_that_cannot_be_addressed_is_a_storage_error(bucket: Bucket, key: str) -> None:
    for use in (bucket.get, bucket.size, bucket.keys, lambda k: bucket.put(k, b""), lambda k: bucket.put_if(k, b"", tag=None)):
        with pytest.raises(StorageError):
            use(key)


def test_what_is_missing_is_none(bucket: Bucket) -> None:
    assert bucket.get("missing") is None
    assert bucket.get_tagged("missing") is None
    assert bucket.size("missing") is None
    assert bucket.keys("missing/") == []


def test_many_keys_are_listed(bucket: Bucket) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: bucket.put(f"many/{number}", b"x"), range(60)))
    assert sorted(bucket.keys("many")) == sorted(f"many/{number}" for number in range(60))
    assert bucket.keys("man") == [], "a prefix is whole parts of a key"


def test_an_object_too_large_to_hold_is_not_read(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_MAX_OBJECT_BYTES", 10)
    bucket.put("large", bytes(11))
    with pytest.raises(TooLargeError, match="11 bytes"):
        bucket.get("large")
    assert bucket.get("large", limit=11) == bytes(11)
    with pytest.raises(TooLargeError) as caught:
        bucket.get("large", limit=5)
    assert caught.value.size == 11


@pytest.mark.parametrize("patience", [60.0, -1.0])
def test_a_reader_may_wait_before_the_content_comes(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
    """Whether S3 still holds the answer or has to be asked again."""
    monkeypatch.setattr(artifacts, "_PATIENCE_S", patience)
    content, told = bytes(range(256)) * 20_000, list[int]()
    bucket.put("large", content)
    assert bucket.get("large", admit=told.append) == content
    assert told == [len(content)]


def test_storage_that_does_not_answer_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    dead = Bucket("nowhere")
    with pytest.raises(StorageError, match="s3://nowhere/key"):
        dead.get("key")


type Write = Callable[[Bucket, bytes, str | None], None]


@pytest.fixture(params=["put_if", "upload_if"])
def write_if(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Both ways to write under a condition: bytes, and a file."""

    def write(bucket: Bucket, data: bytes, tag: str | None) -> None:
        if request.param == "put_if":
            bucket.put_if("pointer", data, tag=tag)
        else:
            (tmp_path / "file").write_bytes(data)
            bucket.upload_if("pointer", tmp_path / "file", tag=tag)

    return write


def test_a_conditional_write_needs_the_version_that_was_read(bucket: Bucket, write_if: Write) -> None:
    write_if(bucket, b"1", None)
    with pytest.raises(ConflictError):
        write_if(bucket, b"2", None)
    found = bucket.get_tagged("pointer")
    assert found is not None
    content, tag = found
    assert content == b"1"
    write_if(bucket, b"2", tag)
    with pytest.raises(ConflictError):
        write_if(bucket, b"3", tag)
    assert bucket.get("pointer") == b"2"


def test_a_version_that_was_deleted_cannot_be_overwritten(bucket: Bucket, write_if: Write) -> None:
    write_if(bucket, b"1", None)
    found = bucket.get_tagged("pointer")
    assert found is not None
    boto3.client("s3").delete_object(Bucket=bucket.name, Key="pointer")
    with pytest.raises(ConflictError):
        write_if(bucket, b"2", found[1])


def test_a_conditional_write_that_fails_for_another_reason_is_no_conflict(aws: str, write_if: Write) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket/pointer"):
        write_if(Bucket("no-such-bucket"), b"1", None)


@pytest.fixture
def champions(bucket: Bucket) -> Champions:
    return Champions(bucket)


def test_before_the_first_promotion_there_is_no_champion(champions: Champions) -> None:
    assert champions.read_tagged("digits") == (None, None)
    assert champions.evaluation("digits", 1) is None


def test_the_pointer_is_swapped_only_from_the_one_that_was_read(champions: Champions) -> None:
    champions.swap(examples.champion(1), tag=None)
    with pytest.raises(ConflictError):
        champions.swap(examples.champion(2), tag=None)
    first, tag = champions.read_tagged("digits")
    assert first == examples.champion(1)
    champions.swap(examples.champion(2), tag=tag)
    with pytest.raises(ConflictError):
        champions.swap(examples.champion(3), tag=tag)
    assert champions.read("digits") == examples.champion(2)
    assert champions.read("faces") is None


def test_of_many_swaps_at_once_exactly_one_wins(champions: Champions) -> None:
    champions.swap(examples.champion(1), tag=None)
    _, tag = champions.read_tagged("digits")

    def swap(version: int) -> bool:
        try:
            champions.swap(examples.champion(version), tag=tag)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(swap, range(2, 10)))
    assert won.count(True) == 1
    champion = champions.read("digits")
    assert champion is not None
    assert champion.version == 2 + won.index(True)


def test_a_model_file_must_be_the_one_that_was_promoted(bucket: Bucket, champions: Champions) -> None:
    pointer = examples.champion(1, b"onnx")
    with pytest.raises(ModelError, match="is missing"):
        champions.onnx(pointer)
    bucket.put(pointer.onnx, b"onnx")
    assert champions.onnx(pointer) == b"onnx"
    bucket.put(pointer.onnx, b"onny")
    with pytest.raises(ModelError, match="SHA-256 differs"):
        champions.onnx(pointer)


@pytest.mark.parametrize("content", [b"", b"{}", b"no json", b'{"model":"\xff"}'])
def test_damaged_records_are_model_errors(bucket: Bucket, champions: Champions, content: bytes) -> None:
    bucket.put("champions/digits.json", content)
    bucket.put("models/digits/1/evaluation.json", content)
    with pytest.raises(ModelError, match="champion pointer of digits is damaged"):
        champions.read("digits")
    with pytest.raises(ModelError, match="evaluation report of digits version 1 is damaged"):
        champions.evaluation("digits", 1)


def test_a_newer_record_with_more_fields_is_still_read(bucket: Bucket, champions: Champions) -> None:
    newer = {**msgspec.to_builtins(examples.champion(4)), "invented_later": {"x": 1}}
    bucket.put("champions/digits.json", msgspec.json.encode(newer))
    assert champions.read("digits") == examples.champion(4)


def test_an_evaluation_is_read_back(bucket: Bucket, champions: Champions) -> None:
    report = examples.evaluation(3)
    bucket.put(artifacts.evaluation_key("digits", 3), msgspec.json.encode(report))
    assert champions.evaluation("digits", 3) == report


def test_buckets_are_apart(new_bucket: Callable[[], Bucket]) -> None:
    one, other = new_bucket(), new_bucket()
    one.put("key", b"1")
    assert other.get("key") is None
