// Which kernel runs and on how many threads.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "flashtrain/common/cuda_host.h"
#include "flashtrain/rotary/rotary_cuda.h"

namespace flashtrain {
namespace {

const RotaryCudaKernels& Kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kRotaryFloat32;
    case DType::kFloat16:
      return kRotaryFloat16;
    default:
      return kRotaryBFloat16;
  }
}

bool IsInPlace(const RotaryParams& p) {
  return std::all_of(p.parts, p.parts + p.num_parts,
                     [](const RotaryPart& part) { return part.x == part.out; });
}

// Whether every slice of `pairs` pairs, and of as many cosines, is aligned to its size, up to 16
// bytes.
bool IsAligned(const RotaryParams& p, int64_t pairs) {
  const auto aligned = [pairs](DType dtype, const void* base,
                               std::initializer_list<int64_t> strides) {
    const int64_t bytes = std::min<int64_t>(16, pairs * DTypeSize(dtype));
    const int64_t elements = bytes / DTypeSize(dtype);
    return IsAlignedTo(base, bytes) &&
           std::all_of(strides.begin(), strides.end(),
                       [elements](int64_t stride) { return stride % elements == 0; });
  };
  if (p.rotary_dim / 2 % pairs != 0 || (p.head_dim - p.rotary_dim) % pairs != 0) return false;
  return std::all_of(p.parts, p.parts + p.num_parts, [&](const RotaryPart& part) {
    return aligned(p.dtype, part.x, {part.x_batch_stride, part.x_seq_stride, part.x_head_stride}) &&
           aligned(p.dtype, part.out,
                   {part.out_batch_stride, part.out_seq_stride, part.out_head_stride}) &&
           aligned(p.table_dtype, part.cos, {p.table_row_stride}) &&
           aligned(p.table_dtype, part.sin, {p.table_row_stride});
  });
}

// False: more heads or elements than a grid has CTAs.
bool MakeTile(const RotaryParams& p, int pairs, RotaryTile* tile) {
  constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1, kMaxGridYZ = 65535, kMaxCtaZ = 64;
  const int64_t columns = IsInPlace(p) ? p.rotary_dim : p.head_dim;
  const int64_t slices = CeilDivide(columns, 2 * pairs);
  int64_t groups = 0;
  for (int i = 0; i < p.num_parts; ++i) {
    const int64_t of_part = CeilDivide(p.parts[i].heads, kRotaryHeadsPerThread);
    groups += of_part;
    if (groups > kMaxGridX) return false;
    tile->head_groups[i] = static_cast<int>(of_part);
  }
  // CTAs of one size: as many as are needed, then as small as they can be.
  const auto split = [](int64_t count, int64_t most, int* size, int64_t* ctas) {
    *ctas = CeilDivide(count, most);
    *size = static_cast<int>(CeilDivide(count, *ctas));
  };
  constexpr int64_t kThreads = RotaryTile::kMaxThreads;
  split(slices, kThreads, &tile->cta_slices, &tile->grid_slices);
  split(groups, kThreads / tile->cta_slices, &tile->cta_groups, &tile->grid_groups);
  tile->cta_tokens =
      static_cast<int>(std::min(kMaxCtaZ, kThreads / (tile->cta_slices * tile->cta_groups)));
  tile->grid_tokens = CeilDivide(p.batch * p.seqlen, tile->cta_tokens);
  if (tile->grid_tokens > kMaxGridX || tile->grid_groups > kMaxGridYZ ||
      tile->grid_slices > kMaxGridYZ) {
    return false;
  }
  tile->slices = static_cast<int>(slices);
  tile->groups = static_cast<int>(groups);
  return true;
}

}  // namespace

Status RotaryCuda(const RotaryParams& p, void* stream) {
  int pairs = 1;
  for (const int bytes : {16, 8}) {
    const int wide = bytes / static_cast<int>(DTypeSize(p.dtype));
    if (pairs == 1 && IsAligned(p, wide)) pairs = wide;
  }
  RotaryTile tile;
  if (!MakeTile(p, pairs, &tile)) {
    return Status::InvalidArgument(std::to_string(p.batch * p.seqlen) + " tokens with heads of " +
                                   std::to_string(p.head_dim) +
                                   " elements; supported: fewer than 2^31 tokens, 2^16 heads and "
                                   "2^24 elements");
  }
  return FromCuda(Kernels(p.dtype).launch(p, tile, pairs, stream), "Rotary", "launch");
}

}  // namespace flashtrain
