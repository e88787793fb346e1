"""The fused kernel: attention and its Jacobian-vector product in one pass over the keys (the mathematics: reference.py).

Against attention alone the pass carries one more accumulator as wide as V, and one more number a row. A head dimension that is
no power of two is cut in two parts that are (72 as 64 + 16), so that little of a product is spent on zeros.

Two things change nothing in exact arithmetic, and keep low precision precise:
- Centring. tO is P tV and the covariance of tS and V under P, and H V - mu O the textbook's unstable way to a covariance: its
  terms are rounded before they cancel, the worse the more all keys and tangents have in common, and the peakier P is. As in
  Welford's algorithm (1962) here mu is the mean of tS over the keys so far, H is P (tS - mu), and what is summed moves with mu:
  sum p (tS - mu') v = sum p (tS - mu) v - (mu' - mu) sum p v. Nothing is left to take off in the end.
- Gain (float16 only): a power of two a row that follows the largest |H|, as the softmax's maximum does: H cannot overflow.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["group", "rows", "keys"])
def attention_jvp(
    Q, K, V, TQ, TK, TV, MASK, LENS, OUT, T_OUT, LSE, MU, scale, group, rows, keys,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tq_b, tq_h, tq_n, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    mask_b, mask_h, mask_q, mask_k, out_b, out_h, out_n,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, MASKED: tl.constexpr, HAS_LENS: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, CENTRED: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS queries of one head. The grid is [tiles of queries, heads, batch].

    Tensors are pointers with strides by batch, head and token (that of D is 1), or with TMA (not with LENS: a descriptor reads
    all tokens), descriptors of them; absent ones are None. D = D0 + D1, or a little less. MASKED: 0, no mask; 1, one for all
    queries; 2, one for each; boolean, or added to the logits. RAGGED: keys are no multiple of KEYS. UPCAST: multiply in
    float32, for the interpreter, which knows no bfloat16 products.
    """
    HAS_TS: tl.constexpr = HAS_TQ or HAS_TK
    first_row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    b = tl.program_id(2)
    kv_head = head // group
    row = first_row + tl.arange(0, ROWS)

    counted = keys  # keys that count; beyond them nothing is looked at
    if HAS_LENS:
        counted = tl.minimum(tl.load(LENS + b).to(tl.int32), keys)

    q0 = _tile(Q, b, head, first_row, rows, q_b, q_h, q_n, 0, D, D0, ROWS, True, TMA)
    q1 = _tile(Q, b, head, first_row, rows, q_b, q_h, q_n, D0, D, D1, ROWS, True, TMA)
    tq0 = q0
    tq1 = q1
    if HAS_TQ:
        tq0 = _tile(TQ, b, head, first_row, rows, tq_b, tq_h, tq_n, 0, D, D0, ROWS, True, TMA)
        tq1 = _tile(TQ, b, head, first_row, rows, tq_b, tq_h, tq_n, D0, D, D1, ROWS, True, TMA)

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mu = tl.zeros([ROWS], tl.float32)
    HALF: tl.constexpr = q0.dtype == tl.float16
    gain = tl.full([ROWS], 1.0, tl.float32) if HALF else 1.0
    o0 = tl.zeros([ROWS, D0], tl.float32)
    t0 = tl.zeros([ROWS, D0], tl.float32)
    o1 = 0.0
    t1 = 0.0
    if D1 > 0:
        o1 = tl.zeros([ROWS, D1], tl.float32)
        t1 = tl.zeros([ROWS, D1], tl.float32)

    ADDED: tl.constexpr = MASKED > 0 and MASK.dtype.element_ty != tl.int1
    EDGE: tl.constexpr = RAGGED or CAUSAL or HAS_LENS  # not every query sees every key of a tile
    last = tl.minimum(counted, first_row + ROWS) if CAUSAL else counted
    for first in tl.range(0, last, KEYS):
        k0 = _tile(K, b, kv_head, first, counted, k_b, k_h, k_n, 0, D, D0, KEYS, EDGE, TMA)
        k1 = _tile(K, b, kv_head, first, counted, k_b, k_h, k_n, D0, D, D1, KEYS, EDGE, TMA)
        s = _logits(q0, q1, k0, k1, tl.zeros([ROWS, KEYS], tl.float32), D1, UPCAST)
        if HAS_TS:
            ts = tl.zeros([ROWS, KEYS], tl.float32)
            if HAS_TQ:
                ts = _logits(tq0, tq1, k0, k1, ts, D1, UPCAST)
            if HAS_TK:
                tk0 = _tile(TK, b, kv_head, first, counted, tk_b, tk_h, tk_n, 0, D, D0, KEYS, EDGE, TMA)
                tk1 = _tile(TK, b, kv_head, first, counted, tk_b, tk_h, tk_n, D0, D, D1, KEYS, EDGE, TMA)
                ts = _logits(q0, q1, tk0, tk1, ts, D1, UPCAST)
        key = first + tl.arange(0, KEYS)
        if MASKED > 0:
            at = MASK + tl.cast(b, tl.int64) * mask_b + tl.cast(head, tl.int64) * mask_h
            if MASKED == 1:
                mask = tl.load(at + key * mask_k, mask=key < counted, other=0)[None, :]
            else:
                at = at + tl.cast(row, tl.int64)[:, None] * mask_q + key[None, :] * mask_k
                mask = tl.load(at, mask=(row < rows)[:, None] & (key < counted)[None, :], other=0)
            s = s * scale + mask.to(tl.float32) if ADDED else tl.where(mask, s, -float("inf"))
        if EDGE:
            seen = (key < counted)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= row[:, None])
            s = tl.where(seen, s, -float("inf"))

        unit = 1.0 if ADDED else scale * LOG2E  # of s; largest is in powers of 2, or with ADDED of e: -3e38 stays a number
        top = tl.maximum(largest, tl.max(s, 1) * unit)
        level = tl.where(top == -float("inf"), 0.0, top) if MASKED > 0 else top  # a row without a key so far
        p = tl.exp2((s - level[:, None]) * LOG2E) if ADDED else tl.exp2(s * unit - level[:, None])
        fade = tl.exp2((largest - level) * LOG2E) if ADDED else tl.exp2(largest - level)
        largest = top
        kept = total * fade
        total = kept + tl.sum(p, 1)

        if HAS_TS:
            before = mu
            mu = mu * kept + tl.sum(p * ts, 1) * scale
            mu = tl.where(total > 0, mu / total, 0.0) if MASKED > 0 else mu / total
            h = p * (ts * scale - mu[:, None]) if CENTRED else p * (ts * scale)
            moved = (mu - before) * gain if CENTRED else 0.0
            fade_t = fade
            if HALF:
                needed = tl.exp2(15.0 - tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(h), 1), 1.0))))
                lower = tl.minimum(gain, needed)
                fade_t = fade * (lower / gain)
                gain = lower
                h = h * gain[:, None]
            if CENTRED:
                t0 = (t0 - moved[:, None] * o0) * fade_t[:, None]
                if D1 > 0:
                    t1 = (t1 - moved[:, None] * o1) * fade_t[:, None]
            else:
                t0 = t0 * fade_t[:, None]
                if D1 > 0:
                    t1 = t1 * fade_t[:, None]
        elif HAS_TV:
            t0 = t0 * fade[:, None]
            if D1 > 0:
                t1 = t1 * fade[:, None]
        v0 = _tile(V, b, kv_head, first, counted, v_b, v_h, v_n, 0, D, D0, KEYS, EDGE, TMA)
        v1 = _tile(V, b, kv_head, first, counted, v_b, v_h, v_n, D0, D, D1, KEYS, EDGE, TMA)
        o0 = _weighted(p, v0, o0 * fade[:, None], UPCAST)
        if D1 > 0:
            o1 = _weighted(p, v1, o1 * fade[:, None], UPCAST)
        if HAS_TS:
            t0 = _weighted(h, v0, t0, UPCAST)
            if D1 > 0:
                t1 = _weighted(h, v1, t1, UPCAST)
        if HAS_TV:
            if HALF and HAS_TS:
                p = p * gain[:, None]
            tv0 = _tile(TV, b, kv_head, first, counted, tv_b, tv_h, tv_n, 0, D, D0, KEYS, EDGE, TMA)
            t0 = _weighted(p, tv0, t0, UPCAST)
            if D1 > 0:
                tv1 = _tile(TV, b, kv_head, first, counted, tv_b, tv_h, tv_n, D0, D, D1, KEYS, EDGE, TMA)
                t1 = _weighted(p, tv1, t1, UPCAST)

    share = tl.where(total > 0, 1 / total, 0.0)
    t_share = share / gain
    back = tl.zeros([ROWS, 1], tl.float32) if CENTRED else mu[:, None]
    o0 = o0 * share[:, None]
    _store(OUT, o0, b, head, row, rows, out_b, out_h, out_n, 0, D)
    _store(T_OUT, t0 * t_share[:, None] - back * o0, b, head, row, rows, out_b, out_h, out_n, 0, D)
    if D1 > 0:
        o1 = o1 * share[:, None]
        _store(OUT, o1, b, head, row, rows, out_b, out_h, out_n, D0, D)
        _store(T_OUT, t1 * t_share[:, None] - back * o1, b, head, row, rows, out_b, out_h, out_n, D0, D)
    at = (tl.cast(b, tl.int64) * tl.num_programs(1) + head) * rows + row
    tl.store(LSE + at, largest + tl.log(total) if ADDED else (largest + tl.log2(total)) / LOG2E, mask=row < rows)
    tl.store(MU + at, mu, mask=row < rows)


@triton.jit
def _tile(
    X, b, head, first, limit, by_batch, by_head, by_token, COLUMN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, BOUNDED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[TOKENS, WIDTH] of one head from token `first` and column COLUMN; zeros beyond D, and if BOUNDED from token `limit`."""
    if WIDTH == 0:
        return 0.0
    elif TMA:
        return X.load([b, head, first, COLUMN]).reshape([TOKENS, WIDTH])
    else:
        token = tl.arange(0, TOKENS)
        column = COLUMN + tl.arange(0, WIDTH)
        at = X + tl.cast(b, tl.int64) * by_batch + tl.cast(head, tl.int64) * by_head + tl.cast(first, tl.int64) * by_token
        at = at + token[:, None] * by_token + column[None, :]
        if BOUNDED and COLUMN + WIDTH > D:
            return tl.load(at, mask=(token < limit - first)[:, None] & (column < D)[None, :], other=0.0)
        elif BOUNDED:
            return tl.load(at, mask=(token < limit - first)[:, None], other=0.0)
        elif COLUMN + WIDTH > D:
            return tl.load(at, mask=(column < D)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def _logits(a0, a1, k0, k1, total, D1: tl.constexpr, UPCAST: tl.constexpr):
    """total + a k^T."""
    total = _dot(a0, tl.trans(k0), total, UPCAST)
    if D1 > 0:
        total = _dot(a1, tl.trans(k1), total, UPCAST)
    return total


@triton.jit
def _weighted(p, v, total, UPCAST: tl.constexpr):
    """total + p v, p rounded as v is."""
    return _dot(p.to(v.dtype), v, total, UPCAST)


@triton.jit
def _store(X, x, b, head, row, rows, by_batch, by_head, by_token, COLUMN: tl.constexpr, D: tl.constexpr):
    column = COLUMN + tl.arange(0, x.shape[1])
    at = X + tl.cast(b, tl.int64) * by_batch + tl.cast(head, tl.int64) * by_head
    at = at + tl.cast(row, tl.int64)[:, None] * by_token + column[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(row < rows)[:, None] & (column < D)[None, :])
