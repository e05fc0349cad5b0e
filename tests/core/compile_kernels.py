"""Compiles every kernel for CUDA, which needs no device. Not within TRITON_INTERPRET."""

import itertools

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from emp_callbacks.core.kernels import choosing, columns, masking, rows, sums, survey

ADDRESSES = "*i64"
TABLE = {"table": ADDRESSES, "owner": "*i32", "start": ADDRESSES, "length": ADDRESSES, "tensors": "i32"}
CALLED_BY_OTHERS = {
    "weighed", "_check_sum", "_place", "_keys", "_count", "_count_ties", "_beyond", "_within",
}  # fmt: skip
POINTERS = {tl.float32: "*fp32", tl.float64: "*fp64", tl.bfloat16: "*bf16"}


def build(kernel, types, constants, warps, capability):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return {kernel.__name__}


def kernels_of(score, key, bits, capability):
    wide = key == tl.float64
    keys, values = "*i64" if wide else "*i32", POINTERS[key]
    built = set()
    for of_rows in (False, True):
        built |= build(
            choosing._choose, {**TABLE, "values": values, "bounds": ADDRESSES, "parts": "*fp64"},
            {"FLOAT": score, "KEY": key, "BITS": bits, "WITHIN_OLD": of_rows, "OF_ROWS": of_rows, "TILE": choosing.TILE,
             "BLOCK": choosing.BLOCK, "CHECKED": choosing.CHECKED, "ALIGNMENT": 16}, choosing.WARPS, capability,
        )  # fmt: skip
    for by_tile, summed in itertools.product((False, True), repeat=2):
        built |= build(
            survey._survey,
            {**TABLE, "group_of": "*i32", "low_g": keys, "shift_g": keys, "parts": "*fp64", "counts": "*i32"},
            {"FLOAT": score, "KEY": key, "BITS": tl.int64 if wide else tl.int32, "BINS": 32 if by_tile else 1 << 18,
             "BY_TILE": by_tile, "SUMS": summed, "HIGHEST": (1 << (63 if wide else 31)) - 1, "TILE": survey.TILE,
             "BLOCK": survey.BLOCK, "ALIGNMENT": 16}, survey.WARPS, capability,
        )  # fmt: skip
    types = {**TABLE, "steps": "*fp64", "group_of": "*i32", "first": ADDRESSES, "sample": values, "groups": "*i32"}
    built |= build(survey._sample, types, {"FLOAT": score, "KEY": key, "BLOCK": 1024}, 4, capability)
    types = {**TABLE, "value_t": values, "limit_tk": ADDRESSES, "found": ADDRESSES, "columns": "i32", "upto": ADDRESSES}
    tiles = {"FLOAT": score, "KEY": key, "TILE": survey.TILE, "BLOCK": survey.BLOCK}
    built |= build(survey._ties_before, {**types, "first": ADDRESSES}, tiles, 4, capability)
    for whole in (False, True):
        built |= build(
            rows._row_thresholds,
            {"all_scores": POINTERS[score], "keep_r": ADDRESSES, "size": "i32", "value": values, "last_tie": ADDRESSES},
            {"KEY": key, "BITS": tl.int64 if wide else tl.int32, "HIGHEST": 62 if wide else 30, "COLUMN_BITS": 12,
             "EVERY_TIE": rows.ALL_TIES, "BLOCK": 4096, "WHOLE": whole}, 8, capability,
        )  # fmt: skip
    types = {"scores": POINTERS[score], "size": "i32", "sums": "*fp64"}
    built |= build(rows._row_moments, types, {"BLOCK": 1024}, 2, capability)
    step = {"TYPE": bits, "BLOCK": masking.BLOCK, "ALIGNMENT": 16}
    for kernel in (masking._mask, masking._copy_masked, masking._follow_shown, masking._put_dense):
        built |= build(kernel, TABLE, step, masking.WARPS, capability)
    return built


if __name__ == "__main__":
    built = kernels_of(tl.bfloat16, tl.float32, tl.int16, 80)
    built |= kernels_of(tl.float32, tl.float32, tl.int32, 90)
    built |= kernels_of(tl.float64, tl.float64, tl.int64, 90)
    one = {"values": "*i16", "mask": "*u8", "size": "i32"}
    built |= build(masking._mask_one, one, {"BLOCK": masking.BLOCK}, masking.WARPS, 90)
    table = {"values": "*i16", "mask": "*u8", "masked": "*i16", "rows": "i32", "width": "i32"}
    built |= build(columns._mask_columns, table, {"BLOCK": columns.BLOCK, "ROWS": columns.ROWS}, 4, 90)
    runs = {"parts": "*fp64", "first": ADDRESSES, "sums": "*fp64", "columns": "i32"}
    built |= build(sums._add_runs, runs, {"BLOCK": 1024}, 4, 90)
    rooms = (choosing, columns, masking, rows, sums, survey)
    kernels = {name for room in rooms for name, value in vars(room).items() if isinstance(value, JITFunction)}
    assert kernels == built | CALLED_BY_OTHERS, kernels ^ (built | CALLED_BY_OTHERS)
