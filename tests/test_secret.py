"""A job's secret: what may be one, who may read its file, how it reaches a child, and that keys are apart."""
import io
import itertools
import os
import subprocess
import sys

import pytest

from commlib.bootstrap import StartError, discover
from commlib.secret import KEY_NBYTES, Secret, SecretError, load_secret, new_secret, read_secret, write_secret

TWO_HOSTS = {"COMMLIB_RANK": "1", "COMMLIB_SIZE": "2", "COMMLIB_LOCAL_RANK": "0", "COMMLIB_LOCAL_SIZE": "1",
             "COMMLIB_CROSS_RANK": "1", "COMMLIB_CROSS_SIZE": "2", "COMMLIB_STORE": "node0:1234", "COMMLIB_JOB": "j"}


def test_every_secret_is_new_and_none_shows_itself():
    texts = {new_secret() for _ in range(100)}
    assert len(texts) == 100
    for text in texts:
        assert text not in repr(Secret(text)) and text not in str(Secret(text))
    assert text not in repr(discover(dict(TWO_HOSTS, COMMLIB_SECRET=text)))


@pytest.mark.parametrize("text", ["x" * 31, "x" * 1025, "x" * 40 + "\n", "x" * 20 + " " + "x" * 20, "\xfc" * 40])
def test_what_can_be_guessed_or_typed_wrongly_is_refused(text):
    with pytest.raises(SecretError, match="make one with python -c"):
        Secret(text)


def test_keys_are_apart():
    """Other secrets, purposes and contexts give other keys; moving a byte from one part to the next does, too."""
    one, other = Secret("1" * 32), Secret("2" * 32)
    parts = [("store",), ("links",), ("store", "job"), ("storejob",), ("store", "jo", "b"), ("store", "j", "ob"), ("store", "")]
    keys = [secret.key(*part) for secret, part in itertools.product((one, other, Secret()), parts)]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {KEY_NBYTES}
    assert one.key("store", b"7") == Secret("1" * 32).key("store", 7)


def test_a_child_gets_it_by_standard_input_and_nothing_else_is_read():
    secret = new_secret()
    code = ("import os; from commlib.secret import read_secret; "
            "s = read_secret(open(0, 'rb', buffering=0, closefd=False)); print(s == os.read(0, 64).decode())")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    write_secret(child.stdin, secret)
    assert child.communicate(secret.encode(), timeout=30)[0] == b"True\n"


@pytest.mark.parametrize("line", [b"", b"\n", b"x" * 64, b"x" * 2000 + b"\n", b"short\n", b"\xff" * 64 + b"\n"])
def test_a_line_that_is_no_secret_is_an_error(line):
    with pytest.raises(SecretError):
        read_secret(io.BytesIO(line))


def file_of(folder, content, mode=0o600):
    path = str(folder / "secret")
    with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        file.write(content)
    os.chmod(path, mode)
    return path


def test_a_file_of_ones_own_is_read(tmp_path):
    secret = new_secret()
    assert load_secret(file_of(tmp_path, secret + "\n")) == secret
    assert discover(dict(TWO_HOSTS, COMMLIB_SECRET_FILE=str(tmp_path / "secret"))).secret.reveal() == secret


@pytest.mark.parametrize("content, mode, words", [("x" * 40, 0o640, "chmod 600"), ("x" * 40, 0o602, "chmod 600"),
                                                  ("", 0o600, "empty"), ("short", 0o600, "make one with")])
def test_a_file_that_is_open_or_holds_no_secret_is_refused(tmp_path, content, mode, words):
    path = file_of(tmp_path, content, mode)
    with pytest.raises(SecretError, match=words):
        load_secret(path)
    with pytest.raises(StartError, match=words):
        discover(dict(TWO_HOSTS, COMMLIB_SECRET_FILE=path))


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(SecretError, match="umask 077"):
        load_secret(str(tmp_path / "none"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path):
    path = file_of(tmp_path, "x" * 40)
    os.chown(path, 12345, 12345)
    with pytest.raises(SecretError, match="belongs to user 12345"):
        load_secret(path)


def test_the_variable_is_no_option_and_comes_before_the_file(tmp_path):
    mine, theirs = new_secret(), new_secret()
    variables = dict(TWO_HOSTS, COMMLIB_SECRET=mine, COMMLIB_SECRET_FILE=file_of(tmp_path, theirs))
    found = discover(variables)
    assert found.secret.reveal() == mine and found.options == {}
    assert not discover(TWO_HOSTS).secret
    with pytest.raises(StartError, match="COMMLIB_SECRET"):
        discover(dict(TWO_HOSTS, COMMLIB_SECRET="guess me"))
