from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.errors import TraceError
from rlgov.workload.readers import detect_kind, read_trace, write_trace
from rlgov.workload.trace import Trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805901,20000,5000"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 02:00:00.509930+02:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,API log
118,GPT-4,417,276,693,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 1100, "output_length": 6, "hash_ids": [0, 1, 3]}
{"timestamp": 3000, "input_length": 1024, "output_length": 7, "hash_ids": [0, 1]}
{"timestamp": 5999, "input_length": 600, "output_length": 8, "hash_ids": [4, 0]}
"""
TIDY = """arrival_s,prompt_tokens,output_tokens
0,374,44
4.3146,396,109
"""


def put(folder: Path, text: str | bytes, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_azure_counts_from_its_first_request(tmp_path: Path) -> None:
    trace = read_trace(put(tmp_path, AZURE))
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 4.314579, 60.0], abs=2e-6)
    assert trace.prompt_tokens.tolist() == [374, 396, 20000]
    assert trace.output_tokens.tolist() == [44, 109, 5000]
    assert trace.duration_s == pytest.approx(90.0)
    assert trace.name == "trace"


def test_azure_with_offsets_compares_moments_not_digits(tmp_path: Path) -> None:
    trace = read_trace(put(tmp_path, AZURE_2024))
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.5], abs=2e-6)


def test_burstgpt_leaves_failed_requests_out_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = read_trace(put(tmp_path, BURSTGPT))
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert trace.output_tokens.tolist() == [18, 276]
    assert trace.notes == ("1 failed requests (zero tokens) of trace.csv left out",)
    assert "1 failed requests" in caplog.text


def test_burstgpt_can_be_read_strictly(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 3: Response tokens is 0"):
        read_trace(put(tmp_path, BURSTGPT), failed="error")


def test_mooncake_replays_block_hashes(tmp_path: Path) -> None:
    trace = read_trace(put(tmp_path, MOONCAKE, "conversation_trace.jsonl"))
    assert trace.arrival_s.tolist() == [0.0, 3.0, 3.0, 5.999]
    # Shared leading blocks hit; a prompt that is cached whole still computes one token; a block that was
    # seen does not hit behind one that was not.
    assert trace.prefix_hit_tokens.tolist() == [0, 1024, 1023, 0]


def test_mooncake_gives_the_hits_of_an_independent_replay(tmp_path: Path) -> None:
    # First rows of the published conversation trace: a system prompt of one block is shared by all.
    rows = [(0, 6758, 500), (0, 7322, 490), (0, 7236, 794), (0, 2290, 316)]
    next_block, lines = 1, []
    for time_ms, prompt, output in rows:
        blocks = -(-prompt // 512) - 1
        hashes = [0, *range(next_block, next_block + blocks)]
        next_block += blocks
        row = {"timestamp": time_ms, "input_length": prompt, "output_length": output, "hash_ids": hashes}
        lines.append(json.dumps(row))
    trace = read_trace(put(tmp_path, "\n".join(lines)))
    assert trace.prefix_hit_tokens.tolist() == [0, 512, 512, 512]


def test_tidy_keeps_its_times(tmp_path: Path) -> None:
    trace = read_trace(put(tmp_path, TIDY.replace("\n0,", "\n1.5,")))
    assert trace.arrival_s.tolist() == [1.5, 4.3146]
    assert not trace.prefix_hit_tokens.any()


def test_columns_may_stand_in_any_order_with_others_between(tmp_path: Path) -> None:
    trace = read_trace(put(tmp_path, "user,output_tokens,arrival_s,prompt_tokens\nx,7,0.5,9\n"))
    assert (trace.arrival_s[0], trace.prompt_tokens[0], trace.output_tokens[0]) == (0.5, 9, 7)


def test_a_whole_prompt_in_the_cache_computes_its_last_token(tmp_path: Path) -> None:
    text = "arrival_s,prompt_tokens,output_tokens,prefix_hit_tokens\n0,100,5,100\n1,100,5,64\n"
    assert read_trace(put(tmp_path, text)).prefix_hit_tokens.tolist() == [99, 64]


@pytest.mark.parametrize(
    "dress", [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n"), gzip.compress]
)
@pytest.mark.parametrize(
    "text", [AZURE, BURSTGPT, MOONCAKE, TIDY], ids=["azure", "burstgpt", "mooncake", "tidy"]
)
def test_byte_order_marks_line_ends_and_gzip_change_nothing(tmp_path: Path, text: str, dress: object) -> None:
    assert callable(dress)
    plain = read_trace(put(tmp_path, text))
    dressed = read_trace(put(tmp_path, dress(text.encode()), "dressed.csv"))
    assert np.array_equal(plain.arrival_s, dressed.arrival_s)
    assert np.array_equal(plain.prompt_tokens, dressed.prompt_tokens)


@pytest.mark.parametrize(
    ("text", "kind"), [(AZURE, "azure"), (BURSTGPT, "burstgpt"), (MOONCAKE, "mooncake"), (TIDY, "tidy")]
)
def test_the_kind_is_told_from_the_header(tmp_path: Path, text: str, kind: str) -> None:
    assert detect_kind(put(tmp_path, text)) == kind


BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "the file is empty"),
    "only white space": ("\n \n", "the file is empty"),
    "header only": ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
    "unknown header": ("a,b,c\n1,2,3\n", "line 1: unknown header 'a,b,c'"),
    "missing column": ("arrival_s,prompt_tokens\n0,5\n", "line 1: missing column output_tokens"),
    "double column": (
        "arrival_s,prompt_tokens,output_tokens,arrival_s\n0,5,5,0\n",
        "line 1: a column name appears",
    ),
    "too few fields": (TIDY + "5,7\n", "line 4: 2 fields where the header has 3"),
    "cut off in the last row": (TIDY + "5,7,", "line 4: output_tokens is ''"),
    "too many fields": (TIDY + "5,7,8,9\n", "line 4: 4 fields"),
    "no number": (TIDY + "5,many,8\n", "line 4: prompt_tokens is 'many'"),
    "negative tokens": (TIDY + "5,7,-8\n", "line 4: output_tokens is -8, negative"),
    "zero tokens": (TIDY + "5,0,8\n", "line 4: prompt_tokens is 0"),
    "half a token": (TIDY + "5,7,8.5\n", "line 4: output_tokens is 8.5, not a whole number"),
    "endless tokens": (TIDY + "5,7,inf\n", "line 4: output_tokens is 'inf', not finite"),
    "far too many tokens": (TIDY + "5,1e18,8\n", "line 4: prompt_tokens is 1e\\+18"),
    "time not finite": (TIDY + "nan,7,8\n", "line 4: arrival_s is 'nan', not finite"),
    "negative time": ("arrival_s,prompt_tokens,output_tokens\n-1,7,8\n", "line 2: arrival_s is negative"),
    "unsorted": (TIDY + "4,7,8\n", "line 4: arrival_s is earlier than on line 3; sort"),
    "unsorted azure": (
        AZURE + "\n2023-11-16 18:15:46.0,1,1\n",
        "line 5: TIMESTAMP is earlier than on line 4",
    ),
    "wall clock": ("arrival_s,prompt_tokens,output_tokens\n1700000000,7,8\n", "line 2: .* not from an epoch"),
    "bad timestamp": (AZURE + "\nyesterday,1,1\n", "line 5: TIMESTAMP is 'yesterday', not a timestamp"),
    "hits above the prompt": (
        "arrival_s,prompt_tokens,output_tokens,prefix_hit_tokens\n0,10,5,11\n",
        "line 2: prefix_hit_tokens is 11, above prompt_tokens 10",
    ),
    "binary": (TIDY.encode() + b"\x00\x01\x02\n", "line 4: binary data"),
    "not utf-8": (TIDY.encode() + b"1,\xff,3\n", "line 4: not UTF-8 text \\(byte 0xff\\)"),
    "utf-16": (TIDY.encode("utf-16"), "line 1: the text is UTF-16"),
    "gzip cut off": (gzip.compress(TIDY.encode())[:-9], "gzip data is damaged"),
    "open quote": (TIDY + '5,"7,8\n6,7,8\n', "malformed CSV"),
    "json cut off": (MOONCAKE[:-30], "line 4: not JSON"),
    "json list": ("[1]\n", "unknown header"),
    "json not an object": (MOONCAKE + "5\n", "line 5: not a JSON object"),
    "json field missing": ('{"timestamp": 0, "input_length": 5}\n', "line 1: missing field output_length"),
    "json text": ('{"timestamp": "0", "input_length": 5, "output_length": 5}\n', "line 1: timestamp is '0'"),
    "json bool": (
        '{"timestamp": 0, "input_length": true, "output_length": 5}\n',
        "line 1: input_length is 'True'",
    ),
    "json nan": ('{"timestamp": NaN, "input_length": 5, "output_length": 5}\n', "line 1: timestamp is 'nan'"),
    "json zero": ('{"timestamp": 0, "input_length": 5, "output_length": 0}\n', "line 1: output_length is 0"),
    "json hashes": (
        '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": ["a"]}\n',
        "line 1: hash_ids is not a list of integers",
    ),
    "json too many hashes": (
        '{"timestamp": 0, "input_length": 512, "output_length": 5, "hash_ids": [1, 2]}\n',
        "line 1: 2 hash_ids for 512 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    text, complaint = BAD[case]
    path = put(tmp_path, text)
    with pytest.raises(TraceError, match=complaint) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "; " in str(caught.value), "the message names no remedy"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=re.escape(str(tmp_path / "absent.csv"))):
        read_trace(tmp_path / "absent.csv")


def test_a_wrong_kind_names_the_columns_it_needs(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="missing column TIMESTAMP, ContextTokens, GeneratedTokens"):
        read_trace(put(tmp_path, TIDY), kind="azure")


def test_one_request_has_a_span(tmp_path: Path) -> None:
    trace = read_trace(put(tmp_path, "arrival_s,prompt_tokens,output_tokens\n0,5,5\n"))
    assert trace.duration_s > 0
    assert len(trace.slice(0.0, trace.duration_s)) == 1


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    n = draw(st.integers(1, 30))
    arrivals = sorted(draw(st.lists(st.floats(0, 1e6), min_size=n, max_size=n)))
    prompts = draw(st.lists(st.integers(1, 200_000), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(1, 10_000), min_size=n, max_size=n))
    hits = [draw(st.integers(0, prompt - 1)) for prompt in prompts]
    return Trace(
        "t",
        np.array(arrivals, dtype=np.float64),
        np.array(prompts, dtype=np.int64),
        np.array(outputs, dtype=np.int64),
        np.array(hits, dtype=np.int64),
        arrivals[-1] + 1.0,
    )


@given(trace=traces(), suffix=st.sampled_from([".csv", ".csv.gz"]))
def test_writing_and_reading_gives_the_same_requests(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("round") / f"t{suffix}"
    write_trace(trace, path)
    back = read_trace(path)
    assert np.array_equal(back.arrival_s, trace.arrival_s)
    assert np.array_equal(back.prompt_tokens, trace.prompt_tokens)
    assert np.array_equal(back.output_tokens, trace.output_tokens)
    assert np.array_equal(back.prefix_hit_tokens, trace.prefix_hit_tokens)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@given(text=st.text(max_size=300))
def test_junk_is_refused_and_never_crashes(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("junk") / "junk.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + text, encoding="utf-8", errors="ignore")
    try:
        trace = read_trace(path)
    except TraceError as error:
        assert str(path) in str(error)  # noqa: PT017  # accepting the junk is no failure
    else:
        assert len(trace) >= 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    trace = read_trace(put(tmp_path, TIDY))
    with pytest.raises(TraceError, match="cannot write the trace"):
        write_trace(trace, tmp_path / "absent" / "t.csv")


@pytest.mark.parametrize(
    ("name", "requests"),
    [("azure_conv_2023", 16495), ("azure_code_2023", 8068), ("mooncake_conversation", 9408)],
)
def test_real_traces_are_read_whole(shared_dir: Path, name: str, requests: int) -> None:
    trace = read_trace(shared_dir / "data" / f"{name}.csv")
    assert len(trace) == requests
    train, test = trace.split(0.7)
    assert len(train) + len(test) == requests
    assert trace.prefix_hit_tokens.any() == (name == "mooncake_conversation")
