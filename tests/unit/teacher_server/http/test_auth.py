"""Keys: the tenant of each key, and the syntax of key files."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.protocol.scoring import TeacherError
from teacher_server.client import read_key
from teacher_server.http.auth import (
    ANONYMOUS,
    KEYS_VARIABLE,
    Authenticator,
    NotAuthorised,
    authenticator,
    key_digest,
    new_key,
    read_keys,
    single_key,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "keys"
    path.write_text(text)
    return path


def test_keys_of_a_file(tmp_path: Path) -> None:
    red, red_digest = new_key()
    blue, blue_digest = new_key()
    second, second_digest = new_key()
    auth = read_keys(
        write(tmp_path, f"# teams\nred {red_digest}\nblue\t{blue_digest}  # theirs\n\nred {second_digest}\n")
    )
    assert auth.tenant(f"Bearer {red}") == auth.tenant(f"bearer {second}") == "red"
    assert auth.tenant(f"Bearer {blue}") == "blue"
    for header in (None, "", "Bearer", "Bearer ", f"Basic {red}", red, f"Bearer {red}x", f"Bearer {red_digest}"):
        with pytest.raises(NotAuthorised):
            auth.tenant(header)


def test_keys_are_long_and_hashes_do_not_hold_them() -> None:
    key, digest = new_key()
    assert len(key) >= 43
    assert digest == key_digest(key) != key
    assert key not in repr(single_key(key))


@pytest.mark.parametrize("line", ["red", "red abc", "red " + "A" * 64, "r/d " + "a" * 64, "red " + "a" * 64 + " more"])
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    with pytest.raises(TeacherError, match=":2:") as caught:
        read_keys(write(tmp_path, f"# first\n{line}\n"))
    assert line not in str(caught.value)


def test_nobody_scores_anonymously_by_accident(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="server_keys_file"):
        authenticator("127.0.0.1", None, allow_anonymous=False)
    with pytest.raises(TeacherError, match="loopback"):
        authenticator("0.0.0.0", None, allow_anonymous=True)
    with pytest.raises(TeacherError, match="holds no key"):
        authenticator("0.0.0.0", write(tmp_path, "# nothing\n"), allow_anonymous=True)
    with pytest.raises(TeacherError, match="cannot be read"):
        authenticator("127.0.0.1", tmp_path / "none", allow_anonymous=True)
    assert authenticator("::1", None, allow_anonymous=True).tenant(None) == ANONYMOUS


def test_keys_of_the_environment(tmp_path: Path) -> None:
    """A variable may hold the lines of a key file. A file and a variable together are refused."""
    (red, red_digest), (blue, blue_digest) = new_key(), new_key()
    for between in ("\n", ",", " ,\n"):
        environ = {KEYS_VARIABLE: f"red {red_digest}{between}blue {blue_digest}"}
        auth = authenticator("0.0.0.0", None, allow_anonymous=False, environ=environ)
        assert (auth.tenant(f"Bearer {red}"), auth.tenant(f"Bearer {blue}")) == ("red", "blue")
    with pytest.raises(TeacherError, match="both set"):
        authenticator("0.0.0.0", write(tmp_path, f"red {red_digest}"), allow_anonymous=False, environ=environ)
    for empty in ("", " ,", "# red"):  # an empty variable refuses every client
        with pytest.raises(TeacherError, match="holds no key"):
            authenticator("127.0.0.1", None, allow_anonymous=True, environ={KEYS_VARIABLE: empty})
    with pytest.raises(TeacherError, match=f"{KEYS_VARIABLE}:2:") as caught:
        authenticator("0.0.0.0", None, allow_anonymous=False, environ={KEYS_VARIABLE: f"red {red_digest},{blue}"})
    assert blue not in str(caught.value)


def test_metrics_are_for_the_operator() -> None:
    assert Authenticator().may_read_metrics(ANONYMOUS)
    auth = Authenticator((("red", b"1" * 32), ("operator", b"2" * 32)))
    assert not auth.may_read_metrics("red")
    assert auth.may_read_metrics("operator")
    assert single_key("k", "red").may_read_metrics("red")  # its teacher has no other tenant


def test_reading_a_runs_key(tmp_path: Path) -> None:
    assert read_key(write(tmp_path, "  abc-1\n")) == "abc-1"
    for text in ("", "two words", "one\ntwo"):
        with pytest.raises(TeacherError, match="one key") as caught:
            read_key(write(tmp_path, text))
        assert not text or text not in str(caught.value)
    with pytest.raises(TeacherError, match="cannot be read"):
        read_key(tmp_path / "none")
