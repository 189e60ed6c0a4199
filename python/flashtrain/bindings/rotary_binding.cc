#include "python/flashtrain/bindings/rotary_binding.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "flashtrain/rotary/rotary.h"
#include "python/flashtrain/bindings/call.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;

int64_t StrideOf(const TensorArg& arg, int dim) {
  return arg.size(dim) == 1 ? 0 : arg.stride(dim);  // any value is right, and 0 is aligned
}

// Reads the arguments one after the other.
class Operands {
 public:
  Operands(py::handle x, bool has_sequences)
      : x_("x", x), token_dims_(has_sequences ? 1 : 2), ndim_(x_.ndim()) {
    if (ndim_ != token_dims_ + 2 && ndim_ != token_dims_ + 3) {
      const std::string tokens = has_sequences ? "[total" : "[batch, seqlen";
      throw std::invalid_argument("x: got " + std::to_string(ndim_) +
                                  " dimensions; supported: " + tokens + ", heads, head_dim] and " +
                                  tokens + ", packed, heads, head_dim]");
    }
    CheckElements(x_, "x");
    p.dtype = x_.float_dtype();
    p.batch = has_sequences ? 1 : x_.size(0);
    p.seqlen = x_.size(token_dims_ - 1);
    p.head_dim = x_.size(ndim_ - 1);
  }

  const TensorArg& x() const { return x_; }
  int64_t heads() const { return x_.size(ndim_ - 2); }
  int64_t total_heads() const { return packed() * heads(); }

  TensorArg ReadOut(py::handle object) {
    const TensorArg out("out", object);
    out.ExpectSameDevice(x_);
    out.ExpectShape(x_.shape(), ndim_);
    out.ExpectFloat(p.dtype);
    CheckElements(out, "out");
    out.ExpectNoOverlap();
    return out;
  }

  // One of the tables, all of one shape and dtype.
  const void* Table(const char* name, py::handle object) {
    const TensorArg table(name, object);
    table.ExpectSameDevice(x_);
    const TensorArg::Matrix matrix = table.ExpectMatrix();
    if (matrix.cols == 0) {
      throw std::invalid_argument(std::string(name) +
                                  ": got no columns; supported: [positions, rotary_dim / 2]");
    }
    if (p.rotary_dim == 0) {
      p.table_dtype = table.float_dtype();
      p.table_len = matrix.rows, p.rotary_dim = 2 * matrix.cols;
      p.table_row_stride = matrix.rows > 1 ? matrix.row_stride : matrix.cols;
    }
    table.ExpectFloat(p.table_dtype);
    table.ExpectShape({p.table_len, p.rotary_dim / 2});
    if (matrix.rows > 1 && matrix.row_stride != p.table_row_stride) {
      throw std::invalid_argument(
          std::string(name) + ": got rows " + std::to_string(matrix.row_stride) +
          " elements apart; supported: as in cos, " + std::to_string(p.table_row_stride));
    }
    return table.data();
  }

  // Heads [first, first + count) of x and out, rotated by the tables unless they are null.
  void Part(const TensorArg& out, int64_t first, int64_t count, const void* cos, const void* sin) {
    if (count == 0) return;
    RotaryPart& part = p.parts[p.num_parts++];
    part.x =
        Element(x_, first, count, &part.x_batch_stride, &part.x_seq_stride, &part.x_head_stride);
    part.out = Element(out, first, count, &part.out_batch_stride, &part.out_seq_stride,
                       &part.out_head_stride);
    part.heads = count, part.cos = cos, part.sin = sin;
  }

  // int32 or int64, one type for all.
  TensorArg Index(const char* name, py::handle object) {
    const TensorArg arg(name, object);
    arg.ExpectSameDevice(x_);
    const bool is_int32 = arg.element_type() == ElementType::kInt32;
    if (!has_index_) p.index_is_int32 = is_int32;
    has_index_ = true;
    arg.ExpectElementType(p.index_is_int32 ? ElementType::kInt32 : ElementType::kInt64);
    return arg;
  }

  RotaryParams p;

 private:
  int64_t packed() const { return ndim_ == token_dims_ + 3 ? x_.size(token_dims_) : 1; }

  void CheckElements(const TensorArg& arg, const char* name) const {
    if (arg.size(ndim_ - 1) <= 1 || arg.stride(ndim_ - 1) == 1) return;
    throw std::invalid_argument(std::string(name) + ": got elements " +
                                std::to_string(arg.stride(ndim_ - 1)) +
                                " apart in the last dimension; supported: adjacent");
  }

  void* Element(const TensorArg& arg, int64_t first, int64_t count, int64_t* batch_stride,
                int64_t* seq_stride, int64_t* head_stride) const {
    *batch_stride = token_dims_ == 2 ? StrideOf(arg, 0) : 0;
    *seq_stride = StrideOf(arg, token_dims_ - 1);
    *head_stride = StrideOf(arg, ndim_ - 2);
    int64_t offset = first * *head_stride;
    if (packed() > 1) {
      if (first % heads() != 0 || count != heads()) {
        throw std::invalid_argument("num_heads_q, num_heads_k: got heads " + std::to_string(first) +
                                    " to " + std::to_string(first + count) +
                                    "; supported: whole entries of " + std::to_string(heads()) +
                                    " heads");
      }
      offset = first / heads() * arg.stride(token_dims_);
    }
    return arg.data<char>() + offset * DTypeSize(p.dtype);
  }

  TensorArg x_;
  int token_dims_;
  int ndim_;
  bool has_index_ = false;
};

void CallRotary(py::handle x, py::handle out, py::handle cos, py::handle sin, py::handle cos_k,
                py::handle sin_k, int64_t num_heads_q, int64_t num_heads_k, int64_t seqlen_offset,
                py::handle seqlen_offsets, py::handle cu_seqlens, py::handle position_ids,
                bool interleaved, bool conjugate, uintptr_t stream) {
  Operands operands(x, !cu_seqlens.is_none());
  RotaryParams& p = operands.p;
  const int64_t total = operands.total_heads();
  if (num_heads_q < 0 || num_heads_q > total || num_heads_k < 0 ||
      num_heads_k > total - num_heads_q) {
    throw std::invalid_argument("num_heads_q, num_heads_k: got " + std::to_string(num_heads_q) +
                                ", " + std::to_string(num_heads_k) + "; supported: at least 0, " +
                                "together at most " + std::to_string(total));
  }
  const int64_t rest = total - num_heads_q - num_heads_k;
  const void* q_tables[] = {operands.Table("cos", cos), operands.Table("sin", sin)};
  const void* k_tables[] = {q_tables[0], q_tables[1]};
  if (!cos_k.is_none()) k_tables[0] = operands.Table("cos_k", cos_k);
  if (!sin_k.is_none()) k_tables[1] = operands.Table("sin_k", sin_k);
  const bool in_place = out.is_none();
  const TensorArg written = operands.ReadOut(in_place ? x : out);
  operands.Part(written, 0, num_heads_q, q_tables[0], q_tables[1]);
  operands.Part(written, num_heads_q, num_heads_k, k_tables[0], k_tables[1]);
  if (!in_place) operands.Part(written, num_heads_q + num_heads_k, rest, nullptr, nullptr);
  if (p.num_parts == 0) return;

  p.seqlen_offset = seqlen_offset;
  p.num_sequences = p.batch;
  if (!cu_seqlens.is_none()) {
    const TensorArg arg = operands.Index("cu_seqlens", cu_seqlens);
    p.num_sequences = (arg.ndim() == 1 ? arg.size(0) : 1) - 1;
    arg.ExpectShape({p.num_sequences + 1});
    arg.ExpectContiguous();
    p.cu_seqlens = arg.data();
  }
  if (!seqlen_offsets.is_none()) {
    const TensorArg arg = operands.Index("seqlen_offsets", seqlen_offsets);
    arg.ExpectShape({p.num_sequences});
    arg.ExpectContiguous();
    p.seqlen_offsets = arg.data();
  }
  if (!position_ids.is_none()) {
    const TensorArg arg = operands.Index("position_ids", position_ids);
    arg.ExpectShape({p.batch, p.seqlen});
    p.position_ids = arg.data();
    p.position_batch_stride = StrideOf(arg, 0), p.position_seq_stride = StrideOf(arg, 1);
  }
  p.interleaved = interleaved, p.conjugate = conjugate;
  Call(operands.x(),
       [&](Device device) { return Rotary(p, device, reinterpret_cast<void*>(stream)); });
}

}  // namespace

void RegisterRotary(py::module_& module) {
  using py::arg;
  module.def("rotary", &CallRotary, arg("x"), arg("out"), arg("cos"), arg("sin"), arg("cos_k"),
             arg("sin_k"), Integer("num_heads_q"), Integer("num_heads_k"), Integer("seqlen_offset"),
             arg("seqlen_offsets"), arg("cu_seqlens"), arg("position_ids"), arg("interleaved"),
             arg("conjugate"), Integer("stream"));
}

}  // namespace flashtrain::bindings
