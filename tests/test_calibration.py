"""Which windows of the calibration text are used, on a tokenizer whose tokens are the words' numbers; kinds of files."""

import gzip
import json

import pyarrow.parquet
import pytest
import torch
import transformers
from tiny_models import CALIBRATION, TINYLM

from foem_vllm.calibration import read_texts, sample_tokens
from foem_vllm.errors import FoemError

END = 0


class Numbers:
    """ "17 18" -> [17, 18]."""

    eos_token_id = END
    chat_template = None

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def documents(*lengths):
    """Texts whose tokens are 1, 2, 3, ... through all of them, and the document of every token."""
    texts, owner, first = [], {}, 1
    for number, length in enumerate(lengths):
        texts.append(" ".join(str(first + i) for i in range(length)))
        owner |= {first + i: number for i in range(length)}
        first += length
    return texts, owner


def sample(texts, samples, seq_len, seed=0):
    found = sample_tokens(texts, Numbers(), samples, seq_len, seed, "some.jsonl")
    assert found.shape == (samples, seq_len)
    return found.tolist()


def check_verbatim(windows, owner):
    """Neighbours are neighbours in their document too, unless the end-of-text token stands between; no token is used twice."""
    for window in windows:
        for a, b in zip(window, window[1:]):
            assert END in (a, b) or (b == a + 1 and owner[a] == owner[b]), window
    used = [t for w in windows for t in w if t != END]
    assert len(used) == len(set(used))


@pytest.mark.parametrize("seed", range(5))
def test_one_window_of_every_long_document_before_a_second_of_any(seed):
    texts, owner = documents(*[500] * 6)
    for samples in (4, 6, 9):
        windows = sample(texts, samples, 10, seed)
        check_verbatim(windows, owner)
        assert len({owner[w[0] or w[1]] for w in windows}) == min(samples, 6)


def test_places_and_documents_depend_on_the_seed_only():
    texts, _ = documents(*[500] * 6)
    assert sample(texts, 4, 10, 3) == sample(texts, 4, 10, 3) == sample(tuple(texts), 4, 10, 3)
    starts = {w[0] % 500 for seed in range(20) for w in sample(texts, 6, 10, seed)}
    assert len(starts) > 60  # 120 windows of 491 places


def test_short_documents_are_joined_by_the_end_of_text_token():
    texts, owner = documents(*[7] * 12)
    windows = sample(texts, 9, 10)
    check_verbatim(windows, owner)
    assert sum(w.count(END) for w in windows) >= 9
    joined = [t for t in texts if str(windows[0][windows[0].index(END) - 1]) in t.split()][0]
    assert int(joined.split()[-1]) == windows[0][windows[0].index(END) - 1]  # the token before END ends its document


@pytest.mark.parametrize("seed", range(5))
def test_short_documents_come_before_rests_of_long_ones(seed):
    texts, owner = documents(1000, *[4] * 10)
    windows = sample(texts, 6, 10, seed)  # one of the long one, five of the short ones (10 * 5 tokens)
    check_verbatim(windows, owner)
    assert sum(any(owner.get(t) == 0 for t in w) for w in windows) == 1
    check_verbatim(sample(texts, 60, 10, seed), owner)


@pytest.mark.parametrize("seed", range(5))
def test_one_long_text_gives_many_windows_from_all_over_it(seed):
    texts, owner = documents(10_000)
    windows = sample(texts, 64, 32, seed)
    check_verbatim(windows, owner)
    assert min(w[0] for w in windows) < 2000 and max(w[0] for w in windows) > 8000
    assert [w[0] for w in windows] != sorted(w[0] for w in windows)
    exactly, owner = documents(640)
    check_verbatim(sample(exactly, 20, 32, seed), owner)


def test_a_stream_is_read_only_as_far_as_needed():
    read = []

    def stream():
        for i in range(100_000):
            read.append(i)
            yield " ".join(str(1 + 20 * i + j) for j in range(20))

    windows = sample(stream(), 100, 10)
    assert len(read) == 2000 and max(w[0] for w in windows) > 20 * 1000


def test_too_little_text_names_both_numbers():
    texts, _ = documents(25, 25, 3)
    with pytest.raises(FoemError, match=r"some.jsonl: 50 tokens, but --samples 8 x --seq-len 10 need 80; give more text"):
        sample(texts, 8, 10)
    with pytest.raises(FoemError, match="0 tokens"):
        sample(["1 2 3"], 1, 10)
    with pytest.raises(FoemError, match="0 tokens"):
        sample([], 1, 10)


def test_chat_without_template():
    with pytest.raises(FoemError, match="--chat-template"):
        sample_tokens(["1 2 3"], Numbers(), 1, 2, 0, chat=True)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json.gz", "parquet"])
def test_calibration_files(suffix, tmp_path):
    """The same documents from every kind of file; .txt is one document."""
    texts = [f"document {i} says something" for i in range(40)]
    path = tmp_path / f"text.{suffix}"
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    if suffix == "txt":
        path.write_text("\n".join(texts))
        assert list(read_texts(str(path))) == ["\n".join(texts)]
        return
    if suffix == "jsonl":
        path.write_text(lines)
    elif suffix == "json.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    assert list(read_texts(str(path))) == texts


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl: damaged, or of another kind .*can't decode byte"),
        ("cut.json.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:40], "damaged, .*ended before the end"),
        ("plain.json.gz", b'{"text": "a"}\n', "damaged, .*Not a gzipped file"),
        ("broken.json.gz", gzip.compress(bytes(range(256)) * 99)[:30] + b"\0" * 50, "damaged, .*write or download it again"),
        ("none.parquet", b"no such thing as this", "none.parquet: damaged, .*write or download"),
        ("list.jsonl", b'{"text": null}\n{"text": ["a"]}\n', "line 2 is not a JSON object with text in the field 'text'"),
    ],
)
def test_files_that_are_not_what_they_should_be(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FoemError, match=says):
        read_texts(str(tmp_path / name))


def test_a_column_of_numbers_is_no_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(FoemError, match="column 'text' is not one of text; name that with --text-column"):
        read_texts(str(tmp_path / "a.parquet"))


def test_sample_tokens_are_whole_windows_of_the_text():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINYLM)
    texts = list(read_texts(str(CALIBRATION)))[:30]
    a, b, c = (sample_tokens(texts, tokenizer, 4, 32, seed) for seed in (0, 0, 1))
    assert a.shape == (4, 32) and torch.equal(a, b) and not torch.equal(a, c)
    whole = "".join(texts)
    piece = tokenizer.decode(a[0][a[0] != 0][5:15])
    assert piece in whole
    chat = sample_tokens([t[:60] for t in texts], tokenizer, 4, 32, 0, chat=True)
    assert "<|im_start|>" in tokenizer.decode(chat.flatten())
