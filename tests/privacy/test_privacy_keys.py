"""Keys and secrets as values."""

from __future__ import annotations

import random

import pytest
from nacl.signing import VerifyKey

from privacy import keys
from protocol.identity import public_key_of


def test_the_first_vector_of_rfc_8032() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = keys.NodeKey(seed)
    assert key.public_key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd"
        "25bf5f0595bbe24655141438e7a100b"
    )
    assert public_key_of(key.peer_id) == key.public_key
    assert key.seed == seed


def test_a_key_signs_so_that_others_can_check() -> None:
    key = keys.NodeKey(b"\x05" * 32)
    VerifyKey(key.public_key).verify(b"said", key.sign(b"said"))


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_seed_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        keys.NodeKey(bytes(size))


def test_a_key_does_not_show_its_seed() -> None:
    seed = bytes(range(32))
    key = keys.NodeKey(seed)
    for shown in (repr(key), str(key), f"{key}", repr([key])):
        assert shown.strip("[]") == f"<NodeKey {key.peer_id}>"
        assert seed.hex() not in shown and repr(seed)[2:-1] not in shown


def test_an_api_key() -> None:
    chance = random.Random(1)
    made = {keys.api_key(chance.randbytes(32)) for _ in range(100)}
    assert len(made) == 100
    for key in made:
        assert key.startswith("ak_") and len(key) == 46 and keys.looks_like_api_key(key)
    for size in (0, 31, 33):
        with pytest.raises(ValueError, match="32 random bytes"):
            keys.api_key(bytes(size))


@pytest.mark.parametrize(
    "text", ["", "ak_", "sk_" + "a" * 43, "ak_" + "a" * 42, "ak_" + "a" * 44, "ak_" + "é" * 43, "AK_" + "a" * 43]
)
def test_what_is_no_api_key(text: str) -> None:
    assert not keys.looks_like_api_key(text)


def test_api_keys_are_stored_hashed_under_a_label() -> None:
    key = keys.api_key(bytes(32))
    hashed = keys.api_key_hash(key)
    assert key not in hashed and len(hashed) == 64
    # printf 'archipelag/api-key/1\0ak_AAAA…' | sha256sum; changing it would make every stored key worthless
    assert hashed == "d246b2e1c5eb6bfb3301acc076b537ee7b5b629b2fbe45e149bddcfa773549e0"
    assert keys.same(hashed, keys.api_key_hash(key))
    assert not keys.same(hashed, keys.api_key_hash(keys.api_key(b"\x01" * 32)))


def test_salts_differ_by_account_and_by_secret() -> None:
    salts = {keys.cache_salt(secret, account) for secret in (b"s1", b"s2") for account in ("a", "b", "")}
    assert len(salts) == 6 and all(len(salt) == 32 for salt in salts)
    assert keys.cache_salt(b"s1", "a") == keys.cache_salt(b"s1", "a")
