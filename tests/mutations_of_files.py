"""Seeded damage to a file's bytes, and to the values of a JSON file: what disks, kills and strangers leave."""

import copy
import json
import os
import random

from nemo_minitron.errors import InputError

DEEP = b"[" * 100_000
ODD = (
    None, True, -1, 0, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "x" * 100_000, "../../x", "\x1b[2J\n\0",
    "\ud800", [], {}, [None], [[[]]], {"a": {"b": []}}, [0] * 1000,
)  # fmt: skip


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def of_bytes(whole, count, seed):
    """`count` damaged versions: flips, truncations, zeros, noise, pieces that are there twice or gone."""
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(whole)
        start = rng.randrange(max(1, len(data)))
        end = min(len(data), start + rng.randrange(1, 64))
        match number % 6:
            case 0:
                for _ in range(rng.randrange(1, 8)):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:]
            case 2:
                data[start:end] = bytes(end - start)
            case 3:
                data[start:end] = rng.randbytes(end - start)
            case 4:
                data[start:start] = data[start:end]
            case 5:
                del data[start:end]
        yield bytes(data)


def of_values(values, count, seed):
    """`count` JSON files with one value of another type or size, one name gone, or one there twice; and a deep one."""
    rng = random.Random(seed)
    places = list(_places(values))
    for number in range(count if places else 0):
        changed = copy.deepcopy(values)
        path = rng.choice(places)
        outer = changed
        for step in path[:-1]:
            outer = outer[step]
        if number % 8 == 6:
            del outer[path[-1]]
        elif number % 8 == 7:
            yield _twice(changed, outer, path[-1]).encode()
            continue
        else:
            outer[path[-1]] = rng.choice(ODD)
        yield json.dumps(changed).encode()
    yield DEEP
    yield b'{"a":' * 100_000
    yield json.dumps([[[[[[[[{}]]]]]]]]).encode()


def _twice(changed, outer, name):
    """A name of an object with two values; of a list the item twice."""
    if isinstance(outer, list):
        outer.insert(name, outer[name])
        return json.dumps(changed)
    outer["TWICE"] = 7
    return json.dumps(changed).replace('"TWICE"', json.dumps(name))


def _places(values, path=()):
    if path:
        yield path
    if isinstance(values, dict):
        items = values.items()
    else:
        items = list(enumerate(values))[:3] if isinstance(values, list) else ()
    for name, value in items:
        yield from _places(value, (*path, name))


def tries(read, file, refused):
    """Reads a file that may be damaged; the sentence of a refusal is added to `refused`."""
    try:
        read(file)
    except InputError as error:
        refused.append(str(error))
