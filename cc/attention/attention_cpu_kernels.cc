// One thread's share of the CPU path. Compiled once per instruction set: FLASHTRAIN_CPU_ISA_NAME is
// Baseline, V3 or V4. Vector lanes are queries in forward and keys in backward, so that softmax
// never sums across a vector.
#include <cmath>
#include <cstdint>

#include "flashtrain/attention/attention_cpu.h"
#include "flashtrain/attention/attention_cpu_tile.h"

namespace flashtrain {
namespace {

constexpr int64_t kQueries = kAttentionQueryBlock;  // a tile's, in both directions
constexpr int64_t kKeys = 64;                       // a tile's; a multiple of 64 (DropoutRow)
static_assert(kQueries % 16 == 0 && kKeys % 64 == 0, "tiles are whole vectors and Philox blocks");

// A block of queries of a head, with the running softmax. [a, kQueries] are a rows of queries.
struct ForwardTile {
  const AttentionForwardParams& p;
  const Sequence& s;
  int64_t head, first_query, queries, lanes;
  float alibi_slope;
  float* q;         // [head_dim, kQueries]
  float* out;       // [head_dim, kQueries], not yet divided by sum
  float* weights;   // [kKeys, kQueries]: products, then scores, then weights
  float* k_buffer;  // [kKeys, head_dim]
  float* v_buffer;  // [kKeys, head_dim]
  float max[kQueries], sum[kQueries], shift[kQueries], rescale[kQueries];
};

int64_t ForwardScratch(const AttentionForwardParams& p) {
  return 2 * (kQueries + kKeys) * p.head_dim + kKeys * kQueries;
}

// Products of `keys` keys from first_key become scores in units of ln 2; -inf where unseen.
void ForwardScores(ForwardTile& t, int64_t first_key, int64_t keys, bool masked) {
  const AttentionForwardParams& p = t.p;
  const int64_t first_position = t.first_query + t.s.shift();
  for (int64_t n = 0; n < keys; ++n) {
    float* __restrict__ row = t.weights + n * kQueries;
    if (p.softcap > 0.0f) {
      const float inner = p.softmax_scale / p.softcap, outer = p.softcap * kLog2E;
      for (int64_t m = 0; m < kQueries; ++m) row[m] = outer * Tanh(row[m] * inner);
    } else {
      const float scale = p.softmax_scale * kLog2E;
      for (int64_t m = 0; m < kQueries; ++m) row[m] *= scale;
    }
    const int64_t distance = first_position - (first_key + n);
    if (p.alibi_slopes != nullptr) {
      const float slope = t.alibi_slope * kLog2E;
      const float start = static_cast<float>(distance);
      for (int m = 0; m < kQueries; ++m) row[m] -= slope * std::fabs(start + m);
    }
    if (!masked) continue;
    // Position minus key is distance + m, and must lie in [-window_right, window_left].
    const int64_t begin = p.window_right < 0 ? 0 : Min(kQueries, -p.window_right - distance);
    const int64_t end = p.window_left < 0 ? kQueries : Max(0, p.window_left - distance + 1);
    for (int64_t m = 0; m < begin; ++m) row[m] = -kInfinity;
    for (int64_t m = end; m < kQueries; ++m) row[m] = -kInfinity;
  }
}

// Scores become weights relative to the maximum so far; what was summed before is rescaled to it.
void ForwardSoftmax(ForwardTile& t, int64_t keys) {
  float* __restrict__ max = t.max;
  float* __restrict__ shift = t.shift;
  float* __restrict__ rescale = t.rescale;
  float* __restrict__ sum = t.sum;
  for (int64_t m = 0; m < kQueries; ++m) shift[m] = max[m];
  for (int64_t n = 0; n < keys; ++n) {
    const float* __restrict__ row = t.weights + n * kQueries;
    for (int64_t m = 0; m < kQueries; ++m) shift[m] = row[m] > shift[m] ? row[m] : shift[m];
  }
  for (int64_t m = 0; m < kQueries; ++m) {
    const float new_max = shift[m];
    // -inf - -inf is NaN: a query that has seen no key yet is shifted by 0.
    shift[m] = new_max == -kInfinity ? 0.0f : new_max;
    rescale[m] = Exp2(max[m] - shift[m]);
    max[m] = new_max;
    sum[m] *= rescale[m];
  }
  for (int64_t d = 0; d < t.p.head_dim; ++d) {
    float* __restrict__ row = t.out + d * kQueries;
    for (int64_t m = 0; m < kQueries; ++m) row[m] *= rescale[m];
  }
  for (int64_t n = 0; n < keys; ++n) {
    float* __restrict__ row = t.weights + n * kQueries;
    for (int64_t m = 0; m < kQueries; ++m) {
      const float weight = Exp2(row[m] - shift[m]);
      row[m] = weight;
      sum[m] += weight;
    }
  }
}

// Zeroes the weights that dropout drops. A Philox block is four keys of one query.
void ForwardDropout(ForwardTile& t, int64_t first_key, int64_t keys) {
  const uint64_t seed = t.p.rng_state[0], offset = t.p.rng_state[1];
  const uint32_t threshold = DropoutThreshold(t.p.dropout_p);
  const int64_t first_row = (t.s.q_row + t.first_query) * t.p.num_heads + t.head;
  for (int64_t n = 0; n < keys; n += 4) {
    const uint32_t group = static_cast<uint32_t>((first_key + n) / 4);
    float* __restrict__ rows = t.weights + n * kQueries;
    for (int64_t m = 0; m < kQueries; ++m) {
      const Philox4 random = PhiloxBlock(seed, offset, first_row + m * t.p.num_heads, group);
      for (int w = 0; w < 4; ++w) {
        float& weight = rows[w * kQueries + m];
        weight = random.word[w] >= threshold ? weight : 0.0f;
      }
    }
  }
}

// Rows of k or v as fp32: in place if they are, else converted into the buffer.
Elements ForwardRows(const ForwardTile& t, const AttentionTensor& tensor, int64_t first_key,
                     int64_t keys, float* buffer) {
  const int64_t offset =
      t.s.Offset(tensor, t.s.k_row, first_key, t.head / (t.p.num_heads / t.p.num_heads_k));
  if (t.p.dtype == DType::kFloat32) {
    return {static_cast<const float*>(tensor.data) + offset, tensor.row_stride, 1};
  }
  LoadRows(tensor, t.p.dtype, offset, keys, t.p.head_dim, buffer, t.p.head_dim);
  return {buffer, t.p.head_dim, 1};
}

void ForwardKeys(ForwardTile& t, int64_t first_key, int64_t keys, bool masked) {
  const AttentionForwardParams& p = t.p;
  const Elements k = ForwardRows(t, p.k, first_key, keys, t.k_buffer);
  Multiply(k, t.q, kQueries, keys, t.lanes, p.head_dim, t.weights, kQueries, false);
  ForwardScores(t, first_key, keys, masked);
  ForwardSoftmax(t, keys);
  if (p.dropout_p > 0.0f) ForwardDropout(t, first_key, keys);
  const Elements v = ForwardRows(t, p.v, first_key, keys, t.v_buffer);
  Multiply({v.data, 1, v.row_stride}, t.weights, kQueries, p.head_dim, t.lanes, keys, t.out,
           kQueries, true);
}

void ForwardStore(const ForwardTile& t) {
  const AttentionForwardParams& p = t.p;
  float* lse = t.s.Lse(p, t.head) + t.first_query;
  const float keep_scale = 1.0f / (1.0f - p.dropout_p);
  float* row = t.k_buffer;
  for (int64_t m = 0; m < t.queries; ++m) {
    const bool blind = t.sum[m] == 0.0f;
    const float scale = blind ? 0.0f : keep_scale / t.sum[m];
    for (int64_t d = 0; d < p.head_dim; ++d) row[d] = t.out[d * kQueries + m] * scale;
    StoreFloat(row, p.head_dim, p.out.data, p.dtype,
               t.s.Offset(p.out, t.s.q_row, t.first_query + m, t.head));
    // In double, so that it is rounded once: backward's weights are wrong by what it is off.
    const double lse2 = t.max[m] + std::log2(static_cast<double>(t.sum[m]));
    lse[m] = blind ? -kInfinity : static_cast<float>(lse2 * kExactLn2);
  }
}

void ForwardBlock(const AttentionForwardParams& p, int64_t sequence, int64_t head, int64_t block,
                  float* scratch) {
  const Sequence s(p, sequence);
  const int64_t first_query = block * kQueries;
  if (first_query >= s.seqlen_q) return;
  ForwardTile t{p, s, head, first_query};
  t.queries = Min(kQueries, s.seqlen_q - first_query);
  t.lanes = RoundUp(t.queries, kLanes);
  t.alibi_slope = AlibiSlope(p, s, head);
  t.q = scratch;
  t.out = t.q + kQueries * p.head_dim;
  t.weights = t.out + kQueries * p.head_dim;
  t.k_buffer = t.weights + kKeys * kQueries;
  t.v_buffer = t.k_buffer + kKeys * p.head_dim;
  // The lanes from `lanes` on are never multiplied, but softmax runs over them.
  std::memset(t.weights, 0, kKeys * kQueries * sizeof(float));
  std::memset(t.out, 0, kQueries * p.head_dim * sizeof(float));
  LoadRows(p.q, p.dtype, s.Offset(p.q, s.q_row, first_query, head), t.queries, p.head_dim,
           t.k_buffer, p.head_dim);
  Transpose(t.k_buffer, p.head_dim, t.queries, p.head_dim, t.q, kQueries);
  for (int64_t m = 0; m < kQueries; ++m) {
    t.max[m] = -kInfinity;
    t.sum[m] = 0.0f;
  }
  const KeyRange range(p, s, first_query, first_query + t.queries);
  for (int64_t key = range.begin / kKeys * kKeys; key < range.end; key += kKeys) {
    const int64_t keys = Min(kKeys, s.seqlen_k - key);
    const bool masked = key < range.full_begin || key + keys > range.full_end;
    ForwardKeys(t, key, keys, masked);
  }
  ForwardStore(t);
}

// The tensors of one query head, in fp32, and the gradients of the key head; rows of `width`.
struct BackwardHead {
  const AttentionBackwardParams& p;
  const Sequence& s;
  int64_t width;       // head_dim rounded up to whole vectors; zeros after head_dim
  int64_t key_blocks;  // of kKeys
  int64_t head = 0;    // query head
  float alibi_slope = 0.0f;
  float* q;        // [seqlen_q, width]
  float* dout;     // [seqlen_q, width]
  float* dq;       // [seqlen_q, width], without the softmax scale
  float* delta;    // [seqlen_q], sum of dout * out
  float* lse;      // [seqlen_q], in units of ln 2
  float* lse_low;  // [seqlen_q], what rounding lse to fp32 leaves
  float* k;        // [seqlen_k, width]
  float* v;        // [seqlen_k, width]
  float* dk;       // [key_blocks, head_dim, kKeys], without the softmax scale
  float* dv;       // [key_blocks, head_dim, kKeys], without the scale of dropout
  float* k_block;  // [head_dim, kKeys]
  float* v_block;  // [head_dim, kKeys]
  float* weights;  // [kQueries, kKeys]: products, then weights as dropout leaves them
  float* dscores;  // [kQueries, kKeys]: dout v^T, then gradients of the scores
};

int64_t BackwardScratch(const AttentionBackwardParams& p) {
  const int64_t width = RoundUp(p.head_dim, kLanes);
  return p.max_seqlen_q * (3 * width + 3) + 2 * p.max_seqlen_k * width +
         2 * RoundUp(p.max_seqlen_k, kKeys) * p.head_dim + 2 * p.head_dim * kKeys +
         2 * kQueries * kKeys;
}

// Row m of the tile: weights and gradients of the scores of one query.
void BackwardRow(const BackwardHead& h, int64_t query, int64_t first_key, int64_t keys,
                 float* __restrict__ weight, float* __restrict__ dscore) {
  const AttentionBackwardParams& p = h.p;
  const float lse = h.lse[query], lse_low = h.lse_low[query], delta = h.delta[query];
  const int64_t position = query + h.s.shift();
  float dtanh[kKeys];
  if (p.softcap > 0.0f) {
    const float inner = p.softmax_scale / p.softcap, outer = p.softcap * kLog2E;
    for (int64_t n = 0; n < kKeys; ++n) {
      const float tanh = Tanh(weight[n] * inner);
      weight[n] = outer * tanh;
      dtanh[n] = 1.0f - tanh * tanh;
    }
  } else {
    const float scale = p.softmax_scale * kLog2E;
    for (int64_t n = 0; n < kKeys; ++n) weight[n] *= scale;
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = h.alibi_slope * kLog2E;
    const float start = static_cast<float>(position - first_key);
    for (int n = 0; n < kKeys; ++n) weight[n] -= slope * std::fabs(start - n);
  }
  for (int64_t n = 0; n < kKeys; ++n) weight[n] = Exp2((weight[n] - lse) - lse_low);
  const int64_t begin =
      p.window_left < 0 ? 0 : Min(kKeys, Max(0, position - p.window_left - first_key));
  const int64_t end =
      p.window_right < 0 ? keys : Min(keys, Max(0, position + p.window_right + 1 - first_key));
  for (int64_t n = 0; n < begin; ++n) weight[n] = 0.0f;
  for (int64_t n = end; n < kKeys; ++n) weight[n] = 0.0f;
  if (p.dropout_p > 0.0f) {
    float keep[kKeys];
    const int64_t row = (h.s.q_row + query) * p.num_heads + h.head;
    DropoutRow(p.rng_state, p.dropout_p, 1.0f, row, first_key, kKeys, keep);
    const float keep_scale = 1.0f / (1.0f - p.dropout_p);
    for (int64_t n = 0; n < kKeys; ++n) {
      dscore[n] = weight[n] * (dscore[n] * (keep[n] * keep_scale) - delta);
      weight[n] *= keep[n];
    }
  } else {
    for (int64_t n = 0; n < kKeys; ++n) dscore[n] = weight[n] * (dscore[n] - delta);
  }
  if (p.softcap > 0.0f) {
    for (int64_t n = 0; n < kKeys; ++n) dscore[n] *= dtanh[n];
  }
}

// One tile of scores: what it gives to dq, dk and dv.
void BackwardTile(const BackwardHead& h, int64_t first_query, int64_t queries, int64_t block,
                  int64_t keys) {
  const int64_t head_dim = h.p.head_dim, width = h.width, first_key = block * kKeys;
  const float* q = h.q + first_query * width;
  const float* dout = h.dout + first_query * width;
  Multiply({q, width, 1}, h.k_block, kKeys, queries, kKeys, head_dim, h.weights, kKeys, false);
  Multiply({dout, width, 1}, h.v_block, kKeys, queries, kKeys, head_dim, h.dscores, kKeys, false);
  for (int64_t m = 0; m < queries; ++m) {
    BackwardRow(h, first_query + m, first_key, keys, h.weights + m * kKeys, h.dscores + m * kKeys);
  }
  Multiply({dout, 1, width}, h.weights, kKeys, head_dim, kKeys, queries,
           h.dv + block * head_dim * kKeys, kKeys, true);
  Multiply({q, 1, width}, h.dscores, kKeys, head_dim, kKeys, queries,
           h.dk + block * head_dim * kKeys, kKeys, true);
  Multiply({h.dscores, kKeys, 1}, h.k + first_key * width, width, queries, width, keys,
           h.dq + first_query * width, width, true);
}

void LoadQueries(BackwardHead& h) {
  const AttentionBackwardParams& p = h.p;
  const Sequence& s = h.s;
  h.alibi_slope = AlibiSlope(p, s, h.head);
  LoadRows(p.q, p.dtype, s.Offset(p.q, s.q_row, 0, h.head), s.seqlen_q, p.head_dim, h.q, h.width);
  LoadRows(p.dout, p.dtype, s.Offset(p.dout, s.q_row, 0, h.head), s.seqlen_q, p.head_dim, h.dout,
           h.width);
  const float* lse = s.Lse(p, h.head);
  float* out_row = h.k_block;
  for (int64_t m = 0; m < s.seqlen_q; ++m) {
    const float* out =
        LoadFloat(p.out.data, p.dtype, s.Offset(p.out, s.q_row, m, h.head), p.head_dim, out_row);
    const float* dout = h.dout + m * h.width;
    LaneSum sum;
    sum.Add(p.head_dim, [out, dout](int64_t d) { return out[d] * dout[d]; });
    h.delta[m] = sum.Total();
    // A query that sees nothing: +inf makes its weights 0.
    const double lse2 = lse[m] == -kInfinity ? kInfinity : lse[m] * kExactLog2E;
    h.lse[m] = static_cast<float>(lse2);
    h.lse_low[m] = std::isfinite(h.lse[m]) ? static_cast<float>(lse2 - h.lse[m]) : 0.0f;
  }
  std::memset(h.dq, 0, s.seqlen_q * h.width * sizeof(float));
}

void BackwardQueryHead(BackwardHead& h) {
  const AttentionBackwardParams& p = h.p;
  const Sequence& s = h.s;
  LoadQueries(h);
  for (int64_t block = 0; block < h.key_blocks; ++block) {
    const int64_t first_key = block * kKeys, keys = Min(kKeys, s.seqlen_k - first_key);
    // The queries that see one of these keys.
    const int64_t begin = p.window_right < 0 ? 0 : Max(0, first_key - p.window_right - s.shift());
    const int64_t end = p.window_left < 0
                            ? s.seqlen_q
                            : Min(s.seqlen_q, first_key + keys + p.window_left - s.shift());
    if (begin >= end) continue;
    Transpose(h.k + first_key * h.width, h.width, keys, p.head_dim, h.k_block, kKeys);
    Transpose(h.v + first_key * h.width, h.width, keys, p.head_dim, h.v_block, kKeys);
    for (int64_t query = begin / kQueries * kQueries; query < end; query += kQueries) {
      BackwardTile(h, query, Min(kQueries, s.seqlen_q - query), block, keys);
    }
  }
  for (int64_t m = 0; m < s.seqlen_q; ++m) {
    float* row = h.dq + m * h.width;
    for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= p.softmax_scale;
    StoreFloat(row, p.head_dim, p.dq.data, p.dtype, s.Offset(p.dq, s.q_row, m, h.head));
  }
}

void StoreKeyGradient(const BackwardHead& h, const float* blocks, float scale,
                      const AttentionTensor& grad, int64_t head_k) {
  const int64_t head_dim = h.p.head_dim;
  float* row = h.k_block;
  for (int64_t n = 0; n < h.s.seqlen_k; ++n) {
    const float* block = blocks + n / kKeys * head_dim * kKeys + n % kKeys;
    for (int64_t d = 0; d < head_dim; ++d) row[d] = block[d * kKeys] * scale;
    StoreFloat(row, head_dim, grad.data, h.p.dtype, h.s.Offset(grad, h.s.k_row, n, head_k));
  }
}

void BackwardKeyHead(const AttentionBackwardParams& p, int64_t sequence, int64_t head_k,
                     float* scratch) {
  const Sequence s(p, sequence);
  BackwardHead h{p, s, RoundUp(p.head_dim, kLanes), (s.seqlen_k + kKeys - 1) / kKeys};
  const auto take = [&scratch](int64_t count) {
    float* taken = scratch;
    scratch += count;
    return taken;
  };
  const int64_t blocks_size = h.key_blocks * p.head_dim * kKeys;
  h.q = take(s.seqlen_q * h.width);
  h.dout = take(s.seqlen_q * h.width);
  h.dq = take(s.seqlen_q * h.width);
  h.k = take(s.seqlen_k * h.width);
  h.v = take(s.seqlen_k * h.width);
  h.dk = take(blocks_size);
  h.dv = take(blocks_size);
  h.k_block = take(p.head_dim * kKeys);
  h.v_block = take(p.head_dim * kKeys);
  h.weights = take(kQueries * kKeys);
  h.dscores = take(kQueries * kKeys);
  h.delta = take(s.seqlen_q);
  h.lse = take(s.seqlen_q);
  h.lse_low = take(s.seqlen_q);
  LoadRows(p.k, p.dtype, s.Offset(p.k, s.k_row, 0, head_k), s.seqlen_k, p.head_dim, h.k, h.width);
  LoadRows(p.v, p.dtype, s.Offset(p.v, s.k_row, 0, head_k), s.seqlen_k, p.head_dim, h.v, h.width);
  std::memset(h.dk, 0, blocks_size * sizeof(float));
  std::memset(h.dv, 0, blocks_size * sizeof(float));
  const int64_t group = p.num_heads / p.num_heads_k;
  for (h.head = head_k * group; h.head < (head_k + 1) * group; ++h.head) BackwardQueryHead(h);
  StoreKeyGradient(h, h.dk, p.softmax_scale, p.dk, head_k);
  StoreKeyGradient(h, h.dv, 1.0f / (1.0f - p.dropout_p), p.dv, head_k);
}

}  // namespace

#define FLASHTRAIN_CONCAT_(a, b) a##b
#define FLASHTRAIN_CONCAT(a, b) FLASHTRAIN_CONCAT_(a, b)
const AttentionCpuKernels FLASHTRAIN_CONCAT(kAttentionCpuKernels, FLASHTRAIN_CPU_ISA_NAME) = {
    ForwardBlock, ForwardScratch, BackwardKeyHead, BackwardScratch};

}  // namespace flashtrain
