"""A second reader of an adapter's file, written from docs/format.md alone: in plain Python, one number at a time.

tests/fuzz_files.py compares it with the real reader: both must read the same bits, or both must refuse.
"""

import json
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
WIDTHS |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
EXPONENTS = {"F64": (52, 11), "F32": (23, 8), "F16": (10, 5), "BF16": (7, 8)}  # dtype of values -> bits of mantissa, exponent
WORD = 2**64 - 1


class Invalid(Exception):
    """The file breaks a rule of docs/format.md."""


class Read(NamedTuple):
    shape: list
    kind: str
    positions: list
    dtype: str
    values: bytes


def demand(condition, rule):
    if not condition:
        raise Invalid(rule)


def read(path):
    """(name -> Read, metadata). Raises Invalid; OSError if there is no such file."""
    arrays, header = parts(Path(path).read_bytes())
    demand(header.get("format") == "shira", "format")
    version = header.get("format_version"), header.get("encoding")
    demand(version in {("1", "plain"), ("2", "gap"), ("3", "gap")}, "version")
    described, metadata = (parsed(header.get(key, "")) for key in ("tensors", "metadata"))
    demand(isinstance(described, dict) and isinstance(metadata, dict), "objects")
    check_conventions(metadata)
    for entry in described.values():
        demand(isinstance(entry, dict), "description")
        check_shape(entry.get("shape"))
        demand(isinstance(entry.get("positions", "plain"), str | dict), "positions")
        demand(entry.get("kind") in ("overwrite", "delta"), "kind")
    with_array = {name for name, entry in described.items() if isinstance(entry.get("positions", "plain"), str)}
    demand(arrays.keys() == {f"{n}.values" for n in described} | {f"{n}.indices" for n in with_array}, "tensors")
    found = {}
    for name, entry in described.items():
        dtype, shape, values = arrays[f"{name}.values"]
        demand(dtype in EXPONENTS and len(shape) == 1, "values")
        demand(all_finite(dtype, values), "finite")
        positions = positions_of(Path(path), name, entry, arrays.get(f"{name}.indices"), len(values) // WIDTHS[dtype])
        rising = all(one < other for one, other in zip(positions, positions[1:], strict=False))
        demand(rising and (not positions or (positions[0] >= 0 and positions[-1] < math.prod(entry["shape"]))), "positions")
        demand(len(positions) == len(values) // WIDTHS[dtype], "count")
        found[name] = Read(entry["shape"], entry["kind"], positions, dtype, values)
    return found, metadata


def parts(content):
    """A safetensors file: (name -> (dtype, shape, bytes), metadata)."""
    demand(len(content) >= 8, "length")
    (length,) = struct.unpack("<Q", content[:8])
    demand(length <= min(len(content) - 8, 100_000_000), "length")
    header = parsed(content[8 : 8 + length])
    demand(isinstance(header, dict), "header")
    metadata, end, arrays = header.pop("__metadata__", {}), 8 + length, {}
    demand(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()), "metadata")
    for name, entry in header.items():
        try:
            dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            check_shape(shape)
            demand(type(begin) is int and type(stop) is int and 0 <= begin <= stop, "offsets")
            demand(math.prod(shape) * WIDTHS[dtype] == stop - begin, "size")
        except (KeyError, TypeError, ValueError) as error:
            raise Invalid(f"header: {error}") from None
        arrays[name] = dtype, shape, begin + 8 + length, stop + 8 + length
    for _, _, begin, stop in sorted(arrays.values(), key=lambda each: each[2:]):
        demand(begin == end, "gap in the file")
        end = stop
    demand(end == len(content), "size of the file")
    return {name: (dtype, shape, content[begin:stop]) for name, (dtype, shape, begin, stop) in arrays.items()}, metadata


def parsed(text):
    """Strict JSON."""

    def once(pairs):
        demand(len(dict(pairs)) == len(pairs), "a key twice")
        return dict(pairs)

    def whole(digits):
        demand(len(digits) <= 40, "digits")
        return int(digits)

    def real(digits):
        demand(math.isfinite(float(digits)), "finite")
        return float(digits)

    def check(value, depth):
        inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        demand(depth <= 32, "depth")
        if isinstance(value, str):
            value.encode()
        for each in inside:
            check(each, depth + 1)

    try:
        text = text.decode() if isinstance(text, bytes) else text
        found = json.loads(text, object_pairs_hook=once, parse_int=whole, parse_float=real, parse_constant=lambda _: 1 / 0)
        check(found, 1)
    except (ValueError, ZeroDivisionError, RecursionError) as error:
        raise Invalid(f"JSON: {error}") from None
    return found


def check_shape(shape):
    demand(isinstance(shape, list) and len(shape) <= 64, "shape")
    demand(all(type(side) is int and side >= 0 for side in shape), "shape")
    demand(math.prod(max(1, side) for side in shape) <= 2**62, "entries")


def check_conventions(metadata):
    def fits(field, *kinds):
        demand(field is None or isinstance(field, kinds), "conventions")
        return field

    for key in ("name", "license"):
        fits(metadata.get(key), str)
    objects = {key: fits(metadata.get(key), dict) or {} for key in ("mask", "base", "training", "fused", "extraction")}
    for key, field, kind in (("mask", "name", str), ("mask", "options", dict), ("base", "id", str)):
        fits(objects[key].get(field), kind)
    for key, field, kind in (("fused", "method", str), ("fused", "strengths", dict)):
        fits(objects[key].get(field), kind)
    dtypes = fits(objects["base"].get("dtype"), str, list)
    demand(all(isinstance(each, str) for each in dtypes or ()), "dtype of the base")
    for value in (fits(metadata.get("fingerprints"), dict) or {}).values():
        demand(isinstance(value, str) and (":" not in value or value.startswith("xxh3:")), "fingerprint")


def all_finite(dtype, values):
    mantissa, exponent = EXPONENTS[dtype]
    ones = ((1 << exponent) - 1) << mantissa
    return all(number & ones != ones for number in numbers(values, WIDTHS[dtype]))


def numbers(content, width, signed=False):
    return [int.from_bytes(content[at : at + width], "little", signed=signed) for at in range(0, len(content), width)]


def positions_of(path, name, entry, array, count):
    """The positions of one tensor."""
    how, shape = entry.get("positions", "plain"), entry["shape"]
    if isinstance(how, str):
        dtype, sides, content = array
        demand(len(sides) == 1, "indices")
        if how == "plain":
            demand(dtype == ("I32" if math.prod(shape) < 2**31 else "I64"), "dtype of indices")
            return numbers(content, WIDTHS[dtype], signed=True)
        demand(how == "gap" and dtype in ("U8", "U16"), "gaps")
        return positions_of_gaps(numbers(content, WIDTHS[dtype]), 255 if dtype == "U8" else 65535)
    if "file" in how:
        positions = borrowed(path, name, shape, how["file"])
    elif how.get("mask") == "rand":
        demand(how.keys() == {"mask", "seed", "crc32"} and type(how["seed"]) is int and 0 <= how["seed"] < 2**63, "rule")
        positions = drawn(math.prod(shape), count, how["seed"])
    else:
        positions = lines(how, shape, count)
    demand(len(positions) == count, "count")
    demand(type(how.get("crc32")) is int and how["crc32"] == crc32(positions), "checksum")
    return positions


def crc32(positions):
    return zlib.crc32(struct.pack(f"<{len(positions)}q", *positions))


def positions_of_gaps(units, largest):
    positions, at, ended = [], -1, True
    for unit in units:
        at += unit
        ended = unit != largest
        if ended:
            at += 1
            positions.append(at)
    demand(ended, "the last unit")
    return positions


def borrowed(path, name, shape, file):
    demand(isinstance(file, str) and file not in ("", ".", "..", path.name) and "/" not in file and "\0" not in file, "file")
    try:
        arrays, header = parts((path.parent / file).read_bytes())
    except (OSError, UnicodeError):
        raise Invalid("file") from None
    found, _ = read(path.parent / file)
    described = json.loads(header["tensors"])
    demand(
        not any(isinstance(e.get("positions"), dict) and "file" in e["positions"] for e in described.values()), "a third file"
    )
    demand(name in found and found[name].shape == shape, "positions of another tensor")
    return found[name].positions


def lines(rule, shape, count):
    """Rows or columns, and the diagonal; no more than one position too many is computed."""
    demand(rule.get("mask") == "struct" and rule.get("direction") in ("rows", "columns"), "rule")
    demand(rule.keys() <= {"mask", "direction", "frequency", "offset", "diagonal", "crc32"} and len(shape) == 2, "rule")
    frequency, first, diagonal = rule.get("frequency"), rule.get("offset", 0), rule.get("diagonal", True)
    demand(type(frequency) is int and type(first) is int and 0 <= first < frequency and type(diagonal) is bool, "rule")
    rows, columns = shape
    across, length = (rows, columns) if rule["direction"] == "rows" else (columns, rows)
    demand(first < max(1, across), "rule")
    found = []
    for line in range(first, across, frequency) if length else ():
        for place in range(length):
            found.append(line * columns + place if rule["direction"] == "rows" else place * columns + line)
            demand(len(found) <= count, "count")
    for place in range(min(rows, columns)) if diagonal else ():
        if place % frequency != first:
            found.append(place * columns + place)
            demand(len(found) <= count, "count")
    return sorted(found)


def drawn(entries, count, seed):
    """The first `count` images of the permutation keyed by the seed, sorted."""
    demand(count <= entries, "rule")
    half = max(1, (max(1, entries - 1).bit_length() + 1) // 2)
    keys = [mixed((number * 0x632BE59BD9B4E019 + seed) & WORD) for number in range(1, 7)]

    def image(position):
        left, right = position >> half, position & ((1 << half) - 1)
        for key in keys:
            left, right = right, left ^ (mixed((right + key) & WORD) & ((1 << half) - 1))
        return (left << half) | right

    found = []
    for position in range(count):
        position = image(position)
        while position >= entries:
            position = image(position)
        found.append(position)
    return sorted(found)


def mixed(word):
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)
