"""Loops of the feed, from the tokens of a block to the inputs of a step, without Python's lock.

NumPy needs some hundred calls for a step's input, and each of them takes the lock from the thread that trains and gives
it back. Here it is a call for each stage. All results are integers, or single products of float64, and equal those of
the plain forms in every bit.

Shapes: D directions, B rows, T window, K negatives, U distinct words, C characters, V vocabulary.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from elmo_ray.kernels.cpu.loops import compiled

try:
    import numba
    from numba.extending import intrinsic
except ImportError:  # a Python that it does not know yet
    numba = None  # type: ignore[assignment]


def _crc_tables() -> np.ndarray:
    """Return uint32 [4, 256]: what a byte adds to a CRC-32 with 0 to 3 bytes behind it."""
    # zlib inverts the number before and after
    one = [zlib.crc32(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]
    tables = [one]
    for _ in range(3):
        tables.append([(value >> 8) ^ one[value & 0xFF] for value in tables[-1]])
    return np.array(tables, np.uint32)


_CRC = _crc_tables()

_pointer: Any = None
_high_product: Any = None
_carray: Any = None
_lowest_bit: Any = None

if numba is not None:
    _carray = numba.carray  # type: ignore[attr-defined]

    @intrinsic
    def _to_pointer(typingctx, address):  # type: ignore[no-untyped-def]
        """Turn an address into a pointer to int64."""
        signature = numba.types.CPointer(numba.types.int64)(numba.types.int64)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    _pointer = _to_pointer

    @intrinsic
    def _upper_half(typingctx, a, b):  # type: ignore[no-untyped-def]
        """Multiply two uint64; the result is the upper half of their product."""
        signature = numba.types.uint64(numba.types.uint64, numba.types.uint64)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            wide = type(context.get_value_type(numba.types.uint64))(128)
            product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
            return builder.trunc(builder.lshr(product, wide(64)), context.get_value_type(numba.types.uint64))

        return signature, generate

    _high_product = _upper_half

    @intrinsic
    def _zeros_below(typingctx, value):  # type: ignore[no-untyped-def]
        """Return the number of zeros below the lowest bit of a uint64, which is not 0."""
        signature = numba.types.uint64(numba.types.uint64)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.cttz(arguments[0], context.get_constant(numba.types.boolean, True))

        return signature, generate

    _lowest_bit = _zeros_below


@compiled
def _cut_row(address: Any, stride: Any, start: Any, tokens_4T: Any) -> None:
    """Copy a window of the piece int64 [4, stride] at this address."""
    unroll = tokens_4T.shape[1]
    piece = _carray(_pointer(address), (3 * stride + start + unroll,))
    for line in range(4):
        first = line * stride + start
        for t in range(unroll):
            tokens_4T[line, t] = piece[first + t]


@compiled
def _hash_row(forward_T: Any, backward_T: Any, length: Any, before: Any) -> Any:
    """Return the CRC-32 of both directions' targets as pairs of little-endian int32, after `before`."""
    crc = np.uint32(before) ^ np.uint32(0xFFFFFFFF)
    for t in range(length):
        for value in (forward_T[t], backward_T[t]):
            crc = np.uint32(crc ^ np.uint32(value & 0xFFFFFFFF))
            crc = np.uint32(
                _CRC[3, crc & np.uint32(0xFF)]
                ^ _CRC[2, (crc >> np.uint32(8)) & np.uint32(0xFF)]
                ^ _CRC[1, (crc >> np.uint32(16)) & np.uint32(0xFF)]
                ^ _CRC[0, crc >> np.uint32(24)]
            )
    return np.int64(crc ^ np.uint32(0xFFFFFFFF))


@compiled
def next_window(
    addresses_B: Any,
    strides_B: Any,
    taken_B: Any,
    whole_B: Any,
    tokens_4BT: Any,
    lengths_B: Any,
    hashes_B: Any,
    directions: Any,
    n_known: Any,
) -> Any:
    """Fill in the rows that are `whole`, and move all hashes on; the counterpart of `StreamLoader._next_window`.

    addresses, strides: of each row's piece, int64 [4, stride], in memory. taken: the positions of it that are done.
    Returns inputs [D, B, T], targets [D, B, T] and the number of inputs that are unknown words.
    """
    _, rows, unroll = tokens_4BT.shape
    inputs = np.empty((directions, rows, unroll), np.int64)
    targets = np.empty((directions, rows, unroll), np.int64)
    n_unknown = 0
    for row in range(rows):
        if whole_B[row]:
            _cut_row(addresses_B[row], strides_B[row], taken_B[row], tokens_4BT[:, row])
        hashes_B[row] = _hash_row(tokens_4BT[1, row], tokens_4BT[3, row], lengths_B[row], hashes_B[row])
        for d in range(directions):
            for t in range(unroll):
                word = tokens_4BT[2 * d, row, t]
                inputs[d, row, t] = word
                targets[d, row, t] = tokens_4BT[2 * d + 1, row, t]
                n_unknown += word >= n_known
    return inputs, targets, n_unknown


@compiled
def mark_sentences(ids: Any, lengths: Any, unknown_base: Any, bos: Any, eos: Any, unk: Any) -> Any:
    """Do what `data.streams.inputs_and_targets` does."""
    tokens = np.empty((4, len(ids) + len(lengths)), np.int64)
    first_word = start = 0
    for sentence in range(len(lengths)):
        length: Any = np.int64(lengths[sentence])
        tokens[0, start], tokens[1, start + length] = bos, eos
        tokens[2, start], tokens[3, start + length] = eos, bos
        for i in range(length):
            word = np.int64(ids[first_word + i])
            as_input = unknown_base - 1 - word if word < 0 else word
            as_target = unk if word < 0 else word
            tokens[0, start + 1 + i], tokens[1, start + i] = as_input, as_target
            tokens[2, start + length - i], tokens[3, start + length - 1 - i] = as_input, as_target
        first_word += length
        start += length + 1
    return tokens


_ONE, _LOW_6, _6 = np.uint64(1), np.uint64(63), np.uint64(6)


@compiled
def _is_new(id_: Any, bits: Any) -> Any:
    """Mark an id; return whether it had no mark.

    A mark is a bit of the first eighth of the `eights`, which a core's own cache holds where it does not hold bytes.
    """
    id_ = np.uint64(id_)
    word, bit = bits[id_ >> _6], _ONE << (id_ & _LOW_6)
    bits[id_ >> _6] = word | bit
    return (word & bit) == np.uint64(0)


@compiled
def _mark(ids: Any, bits: Any) -> Any:
    """Mark the ids that are not negative; return how many had no mark."""
    count = 0
    for i in range(len(ids)):
        if ids[i] >= 0 and _is_new(ids[i], bits):
            count += 1
    return count


@compiled
def _take_marked(bits: Any, count: Any, index_of: Any) -> Any:
    """Return the `count` marked ids in order, without their marks, and number them in `index_of`."""
    found = np.empty(count, np.int64)
    n = 0
    for place in range((len(index_of) + 63) // 64):
        word = np.uint64(bits[place])
        if word != np.uint64(0):
            bits[place] = np.uint64(0)
        while word != np.uint64(0):
            at = 64 * place + np.int64(_lowest_bit(word))
            word &= word - _ONE
            found[n] = at
            index_of[at] = n
            n += 1
    return found


@compiled
def distinct_ids(ids: Any, eights: Any, index_of: Any) -> Any:
    """Do what `data.word_types.UniqueIndex.unique` does. eights: a byte for each id, all 0, as uint64."""
    return _take_marked(eights, _mark(ids, eights), index_of)


@compiled
def _copy_row(source: Any, target: Any) -> None:
    for i in range(len(target)):
        target[i] = source[i]


@compiled
def types_by_class(
    ids: Any,
    unknown_UC: Any,
    unknown_classes_U: Any,
    table_VC: Any,
    classes_V: Any,
    n_classes: Any,
    eights: Any,
    index_of: Any,
) -> Any:
    """Do what `data.word_types.TypeTable.types_of` does."""
    words = distinct_ids(ids, eights, index_of)
    known = len(words) - len(unknown_UC)
    counts = np.zeros(n_classes, np.int64)
    for word in words[:known]:
        counts[classes_V[word]] += 1
    for each in unknown_classes_U:
        counts[each] += 1
    ends = np.cumsum(counts)
    next_place = ends - counts
    types = np.empty((len(words), table_VC.shape[1]), table_VC.dtype)
    # words keep their order within a class
    for i in range(len(words)):
        word_class = classes_V[words[i]] if i < known else unknown_classes_U[i - known]
        place = next_place[word_class]
        next_place[word_class] += 1
        if i < known:
            _copy_row(table_VC[words[i]], types[place])
        else:
            _copy_row(unknown_UC[i - known], types[place])
        index_of[words[i]] = place
    inputs = np.empty(len(ids), np.int64)
    for i in range(len(ids)):
        inputs[i] = index_of[ids[i]]
    return types, counts, inputs


_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_TO_UNIT = 1.0 / 2**53


@compiled
def uniform(keys_D2: Any, first: Any, factor: Any, draws_DN: Any) -> None:
    """Fill in the draws `first` to `first + N` of `Generator(Philox(key=...)).random()`, times a factor.

    keys: uint64, a generator of each direction; `first` and N are multiples of 4. This is Philox4x64-10 (Salmon et al.
    2011), for NumPy takes longer to make a generator than to draw from it.
    """
    for d in range(len(draws_DN)):
        for at in range(0, draws_DN.shape[1], 4):
            a, b, c, e = np.uint64((first + at) // 4 + 1), np.uint64(0), np.uint64(0), np.uint64(0)
            key_0, key_1 = keys_D2[d, 0], keys_D2[d, 1]
            for _ in range(10):
                high_a, low_a = _high_product(_MULTIPLIERS[0], a), _MULTIPLIERS[0] * a
                high_c, low_c = _high_product(_MULTIPLIERS[1], c), _MULTIPLIERS[1] * c
                a, b, c, e = high_c ^ b ^ key_0, low_c, high_a ^ e ^ key_1, low_a
                key_0, key_1 = key_0 + _KEY_STEPS[0], key_1 + _KEY_STEPS[1]
            draws_DN[d, at] = np.int64(a >> np.uint64(11)) * _TO_UNIT * factor
            draws_DN[d, at + 1] = np.int64(b >> np.uint64(11)) * _TO_UNIT * factor
            draws_DN[d, at + 2] = np.int64(c >> np.uint64(11)) * _TO_UNIT * factor
            draws_DN[d, at + 3] = np.int64(e >> np.uint64(11)) * _TO_UNIT * factor


@compiled
def keep_first_distinct(draws_DN: Any, n_words: Any, eights: Any, ids_DK: Any, kept_D: Any, tries_D: Any) -> None:
    """Add the first distinct ones of these draws to the `kept` of each direction until there are K.

    draws: float64, whose whole part is an id. tries: the draws that were looked at.
    """
    for d in range(len(draws_DN)):
        kept, tries, ids = kept_D[d], tries_D[d], ids_DK[d]
        for i in range(kept):
            _is_new(ids[i], eights)
        for i in range(draws_DN.shape[1]):
            if kept == len(ids):
                break
            tries += 1
            word = min(np.int64(draws_DN[d, i]), n_words - 1)
            if _is_new(word, eights):
                ids[kept] = word
                kept += 1
        for i in range(kept):
            eights[np.uint64(ids[i]) >> _6] = np.uint64(0)
        kept_D[d], tries_D[d] = kept, tries


@compiled
def touched_rows(
    touched: Any,
    more: Any,
    targets_DBT: Any,
    negatives_DK: Any,
    tries_D: Any,
    log_missed_V: Any,
    eights: Any,
    index_of: Any,
) -> Any:
    """Do what `training.noise.touched_rows` does."""
    directions, negatives = negatives_DK.shape
    count = _mark(touched, eights) + _mark(more, eights)
    for d in range(directions):
        count += _mark(negatives_DK[d], eights)
    rows = _take_marked(eights, count, index_of)
    index_of[0] = 0
    target_rows, negative_rows = np.empty(targets_DBT.shape, np.int64), np.empty(negatives_DK.shape, np.int64)
    positions = targets_DBT.size // directions
    logs = np.empty(directions * (positions + negatives))
    targets_DN, target_rows_DN = targets_DBT.reshape(directions, positions), target_rows.reshape(directions, positions)
    for d in range(directions):
        for i in range(positions):
            word = max(targets_DN[d, i], 0)
            target_rows_DN[d, i] = index_of[word]
            logs[d * positions + i] = tries_D[d] * log_missed_V[word]
        first = directions * positions + d * negatives
        for i in range(negatives):
            word = negatives_DK[d, i]
            negative_rows[d, i] = index_of[word]
            logs[first + i] = tries_D[d] * log_missed_V[word]
    return rows, target_rows, negative_rows, logs


@compiled
def sort_positions(ids: Any, count: Any) -> Any:
    """Return the places of flat ids, all from 0 to count - 1, by row: those of `kernels.gpu.rows.sort_positions`.

    The places of row r are order[starts[r] : starts[r + 1]], in rising order; order: int32 [N], starts: int32
    [count + 1].
    """
    starts = np.zeros(count + 1, np.int32)
    for i in range(len(ids)):
        starts[ids[i] + 1] += 1
    for row in range(count):
        starts[row + 1] += starts[row]
    order = np.empty(len(ids), np.int32)
    for i in range(len(ids)):
        order[starts[ids[i]]] = i
        starts[ids[i]] += 1
    # each start has moved to the next one's place
    for row in range(count, 0, -1):
        starts[row] = starts[row - 1]
    starts[0] = 0
    return order, starts
