"""Small damage to JSON, text and bytes, drawn from a seed: the same seed, the same damage."""

import json
import math
import random
import struct

STRANGE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**9,
    -(10**9),
    10**20,
    10**400,
    0.5,
    -0.0,
    1e-300,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "0",
    "null",
    "../../x",
    "/etc/passwd",
    "os.system",
    "linear",
    "relu",
    "é\u2028\x00",
    "x" * 5000,
    [],
    [[]],
    [1],
    [1, 2, 3],
    [None],
    ["a", 1, None],
    [0.5] * 3,
    {},
    {"a": 1},
    {"name": "static", "thresholds": [None]},
    {"model_type": "bert"},
]


def places(values, path=()):
    """Paths to everything in JSON values."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def edited(values, draw: random.Random):
    """A copy of a JSON object with one thing changed, and words for what."""
    values = json.loads(json.dumps(values))
    found = list(places(values))
    path = draw.choice([place for place in found if len(place) == draw.choice([1, 1, len(place)])] or found)
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    old, kind = parent[path[-1]], draw.randrange(8)
    if kind == 0:
        del parent[path[-1]]
        return values, f"{path} deleted"
    if kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["x", path[-1] + "s", path[-1].upper()])] = parent.pop(path[-1])
        return values, f"{path} renamed"
    if kind == 2 and isinstance(old, (int, float)):
        parent[path[-1]] = draw.choice([old + 1, old - 1, old * 2, -old, old / 2, old + 1e-7, float(old), str(old)])
    elif kind == 3 and isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), old)
    elif kind == 4:
        for _ in range(draw.choice([3, 70, 900])):
            old = [old] if draw.random() < 0.5 else {"a": old}
        parent[path[-1]] = old
    elif kind == 5:
        other = draw.choice(found)
        there = values
        for key in other:
            there = there[key]
        parent[path[-1]] = json.loads(json.dumps(there))
    else:
        parent[path[-1]] = draw.choice(STRANGE)
    return values, f"{path} is {str(parent[path[-1]])[:60]}"


def damaged(data: bytes, draw: random.Random):
    """A copy of bytes with one thing damaged, and words for what."""
    kind, place = draw.randrange(7), draw.randrange(max(len(data), 1))
    if kind == 0:
        return data[:place], f"cut at {place}"
    if kind == 1:
        return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :], f"a bit at {place}"
    if kind == 2:
        return data[:place] + draw.randbytes(draw.randrange(1, 40)) + data[place:], f"bytes put in at {place}"
    if kind == 3:
        end = min(len(data), place + draw.randrange(1, 40))
        return data[:place] + data[end:], f"{place} to {end} left out"
    if kind == 4:
        return draw.choice(
            [b"", b"{}", b"[]", b"null", b"3", b"\xff\xfe{\x00}\x00", data + data, b"[" * 5000]
        ), "another file"
    if kind == 5:
        return data.decode("latin-1").encode("utf-16"), "utf-16"
    return data.replace(b'":', b'":' + draw.choice([b"[[", b"1,", b"NaN,", b'"', b"1e999,"]), 1), "broken syntax"


def edited_header(data: bytes, draw: random.Random):
    """A safetensors file whose header has one thing changed."""
    size = struct.unpack("<Q", data[:8])[0]
    header, words = edited(json.loads(data[8 : 8 + size]), draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :], f"header: {words}"
