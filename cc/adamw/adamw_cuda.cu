// The table of the CUDA path, and its launches.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "flashtrain/adamw/adamw_kernel.cuh"
#include "flashtrain/common/cuda_host.h"

namespace flashtrain {
namespace {

constexpr char kOp[] = "AdamWStep";

// Part of the table, by value: no host memory has to outlive the call, and a captured graph keeps
// it. A kernel takes 32,764 bytes of parameters.
struct TablePage {
  static constexpr int64_t kWords = 2040;
  uint4* to;
  int words;
  uint4 word[kWords];
};
static_assert(sizeof(TablePage) <= 32764, "a kernel's parameters");

__global__ void adamw_table_kernel(const __grid_constant__ TablePage page) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < page.words) page.to[i] = page.word[i];
}

Status WriteTable(const std::vector<uint4>& table, void* to, cudaStream_t stream) {
  TablePage page;
  for (size_t begin = 0; begin < table.size(); begin += TablePage::kWords) {
    page.to = static_cast<uint4*>(to) + begin;
    page.words = static_cast<int>(std::min<size_t>(TablePage::kWords, table.size() - begin));
    std::memcpy(page.word, table.data() + begin, page.words * sizeof(uint4));
    adamw_table_kernel<<<(page.words + 255) / 256, 256, 0, stream>>>(page);
    FLASHTRAIN_RETURN_IF_ERROR(FromCuda(cudaGetLastError(), kOp, "launch of the table's kernel"));
  }
  return Status();
}

bool IsAligned(const void* ptr, DType dtype) { return IsAlignedTo(ptr, 4 * DTypeSize(dtype)); }

AdamWRecord MakeRecord(const AdamWTensor& t, int64_t first_chunk) {
  AdamWRecord r;
  std::memset(&r, 0, sizeof(r));  // the padding too: tables are compared by bytes
  r.param = t.param, r.master = t.master, r.grad = t.grad;
  r.exp_avg = t.exp_avg, r.exp_avg_sq = t.exp_avg_sq, r.step = t.step;
  r.numel = t.numel;
  r.first_chunk = static_cast<int32_t>(first_chunk);
  r.group = static_cast<uint16_t>(t.group);
  r.param_dtype = t.param_dtype, r.grad_dtype = t.grad_dtype;
  r.vectorizable = IsAligned(t.param, t.param_dtype) && IsAligned(t.grad, t.grad_dtype) &&
                   IsAligned(t.master, DType::kFloat32) && IsAligned(t.exp_avg, DType::kFloat32) &&
                   IsAligned(t.exp_avg_sq, DType::kFloat32);
  return r;
}

AdamWGroupRecord MakeRecord(const AdamWGroup& g) {
  AdamWGroupRecord r;
  std::memset(&r, 0, sizeof(r));
  r.beta1 = g.beta1, r.beta2 = g.beta2;
  r.lr_on_device = g.lr_on_device;
  r.lr = static_cast<float>(g.lr);
  r.one_minus_beta1 = static_cast<float>(1.0 - g.beta1);
  r.one_minus_beta2 = static_cast<float>(1.0 - g.beta2);
  r.eps = static_cast<float>(g.eps);
  r.weight_decay = static_cast<float>(g.weight_decay);
  return r;
}

// The table as adamw_cuda.h describes it, and the number of chunks.
std::vector<uint4> MakeTable(const AdamWParams& p, int64_t* chunks) {
  std::vector<uint4> table(AdamWTableBytes(p.num_tensors, p.num_groups) / sizeof(uint4));
  std::memset(table.data(), 0, table.size() * sizeof(uint4));
  auto* records = reinterpret_cast<AdamWRecord*>(table.data() + 1);
  *chunks = 0;
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    records[i] = MakeRecord(p.tensors[i], *chunks);
    *chunks += (p.tensors[i].numel + kAdamWChunk - 1) / kAdamWChunk;
  }
  if (p.num_groups > kAdamWGroupsByValue) {
    auto* groups = reinterpret_cast<AdamWGroupRecord*>(records + p.num_tensors);
    for (int64_t i = 0; i < p.num_groups; ++i) groups[i] = MakeRecord(p.groups[i]);
  }
  return table;
}

// Writes the table to the device, if it does not hold it yet.
Status UpdateTable(const AdamWParams& p, const std::vector<uint4>& table, cudaStream_t stream) {
  const size_t bytes = table.size() * sizeof(uint4);
  if (p.table_on_host == nullptr) return WriteTable(table, p.table, stream);
  // Both mirrors start as zeros, and no table of a tensor is.
  if (std::memcmp(p.table_on_host, table.data(), bytes) == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(WriteTable(table, p.table, stream));
  std::memcpy(p.table_on_host, table.data(), bytes);
  return Status();
}

Status ValidateTable(const AdamWParams& p) {
  constexpr int64_t kMax = int64_t{1} << 31, kMaxGroups = 65536;
  if (p.num_tensors >= kMax || p.num_groups > kMaxGroups) {
    return Status::InvalidArgument(
        std::to_string(p.num_tensors) + " tensors in " + std::to_string(p.num_groups) +
        " groups; supported: fewer than 2^31 tensors, at most 65,536 groups");
  }
  int64_t chunks = 0;
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    chunks += (p.tensors[i].numel + kAdamWChunk - 1) / kAdamWChunk;
  }
  if (chunks >= kMax) {
    return Status::InvalidArgument("the tensors have " + std::to_string(chunks) + " chunks of " +
                                   std::to_string(kAdamWChunk) +
                                   " elements; supported: fewer than 2^31");
  }
  const int64_t needed = AdamWTableBytes(p.num_tensors, p.num_groups);
  if (p.table != nullptr && p.table_bytes >= needed) return Status();
  return Status::InvalidArgument("table is null or of " + std::to_string(p.table_bytes) +
                                 " bytes; AdamWTableBytes asks for " + std::to_string(needed));
}

}  // namespace

static_assert(sizeof(AdamWTableHeader) == 16 && sizeof(AdamWRecord) == 64 &&
                  sizeof(AdamWGroupRecord) % 8 == 0,
              "the table is made of these, one after the other");

int64_t AdamWTableBytes(int64_t num_tensors, int64_t num_groups) {
  const int64_t groups = num_groups > kAdamWGroupsByValue ? num_groups : 0;
  const int64_t bytes = static_cast<int64_t>(sizeof(AdamWTableHeader)) +
                        num_tensors * static_cast<int64_t>(sizeof(AdamWRecord)) +
                        groups * static_cast<int64_t>(sizeof(AdamWGroupRecord));
  return (bytes + 15) / 16 * 16;
}

Status AdamWStepCuda(const AdamWParams& p, void* stream) {
  if (p.num_tensors == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(ValidateTable(p));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int64_t chunks = 0;
  FLASHTRAIN_RETURN_IF_ERROR(UpdateTable(p, MakeTable(p, &chunks), cuda_stream));
  AdamWLaunch launch = {};
  launch.header = static_cast<AdamWTableHeader*>(p.table);
  launch.records = reinterpret_cast<const AdamWRecord*>(launch.header + 1);
  launch.num_tensors = static_cast<int>(p.num_tensors);
  launch.grad_scale = p.grad_scale, launch.grad_norm = p.grad_norm, launch.skip = p.skip;
  launch.skipped_steps = p.skipped_steps;
  launch.max_norm = static_cast<float>(p.max_norm);
  if (p.num_groups > kAdamWGroupsByValue) {
    launch.groups_in_table =
        reinterpret_cast<const AdamWGroupRecord*>(launch.records + p.num_tensors);
  } else {
    std::transform(p.groups, p.groups + p.num_groups, launch.groups,
                   [](const AdamWGroup& group) { return MakeRecord(group); });
  }
  // Without elements there are still steps to count.
  const auto ctas = static_cast<unsigned>(std::max<int64_t>(1, chunks));
  adamw_kernel<<<ctas, kAdamWThreads, 0, cuda_stream>>>(launch);
  return FromCuda(cudaGetLastError(), kOp, "launch");
}

}  // namespace flashtrain
